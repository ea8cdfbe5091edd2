"""Kills a training at random moments, resumes it, and compares it bit for bit with one that was
left alone: `python tests/training/kill_and_resume.py --kills 20`."""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outcomes import outcome, unequal
from processes import PATIENCE, STARTED, start

from mmixer_kernels.training import checkpoint

OPTIONS = [
    *("--frames", "4", "--frame-size", "8", "--samples", "128", "--evaluation-samples", "16"),
    *("--model.hidden-size", "8", "--model.engine", "reference", "--model.dropout", "0.3"),
    *("--optimizer.schedule", "cosine", "--optimizer.learning-rate", "0.01"),
    *("--loader.batch-size", "3", "--loader.workers", "2", "--checkpoint-steps", "3"),
]


def left_alone(arguments: Sequence[str], folder: Path, world: int) -> tuple[dict[str, Any], float]:
    """The outcome of an uninterrupted training, and its seconds without the start."""
    job = start([*arguments, "--output", str(folder)], folder / "log", world)
    job.wait_for(STARTED, PATIENCE)
    begin = time.monotonic()
    codes = job.finish(PATIENCE)
    if set(codes) != {0}:
        raise RuntimeError(f"exit codes {codes}: {job.log.read_text()}")
    return outcome(folder), time.monotonic() - begin


def killed(
    arguments: Sequence[str],
    folder: Path,
    world: int,
    kills: int,
    seconds: float,
    draw: random.Random,
) -> int:
    """Trains to the end with up to `kills` kills, and returns how many there were.

    Three of four kills come up to `seconds` after the first step can begin, the others during the
    start; one of two takes one process only, as does the memory's end on one machine of many.
    """
    done = 0
    while True:
        begun = any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS))
        more = ["--output", str(folder), *(["--resume"] if begun else [])]
        job = start([*arguments, *more], folder / f"log-{done}", world)
        if done < kills:
            if draw.random() < 0.75:
                job.wait_for(STARTED, PATIENCE)
                time.sleep(draw.uniform(0, seconds))
            else:
                time.sleep(draw.uniform(0, 1))
            ranks = list(range(world)) if draw.random() < 0.5 else [draw.randrange(world)]
            if all(job.processes[rank].is_alive() for rank in ranks):
                job.kill(ranks)
                done += 1
                survivors = [code for code in job.finish(30) if code != -signal.SIGKILL]
                print(f"kill {done}: process {ranks}, others ended with {survivors};", end=" ")
                print(f"checkpoint at {_position(folder)}", flush=True)
                continue
        codes = job.finish(PATIENCE)
        if set(codes) != {0}:
            raise RuntimeError(f"exit codes {codes}: {job.log.read_text()}")
        return done


def _position(folder: Path) -> str:
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        if (folder / name).exists():
            state = checkpoint.load(folder / name)
            return f"epoch {state['epoch']}, step {state['step']} ({name})"
    return "the start"


def check(folder: Path, world: int, kills: int, epochs: int, seed: int) -> None:
    """Kills trainings `kills` times in all.

    Raises:
        AssertionError: one did not end as the training that was left alone.
    """
    arguments = [*OPTIONS, "--epochs", str(epochs)]
    expected, seconds = left_alone(arguments, folder / "alone", world)
    draw = random.Random(seed)
    done = number = 0
    while done < kills:
        number += 1
        output = folder / f"killed-{number}"
        done += killed(arguments, output, world, kills - done, 1.6 * seconds / kills, draw)
        different = unequal(outcome(output), expected)
        assert not different, f"after kills, {output} differs in {different}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for world in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            check(Path(folder), world, options.kills, options.epochs, options.seed)
        seconds = math.ceil(time.monotonic() - begin)
        print(
            f"{world} {'process' if world == 1 else 'processes'}: bit-equal after "
            f"{options.kills} kills ({seconds} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
