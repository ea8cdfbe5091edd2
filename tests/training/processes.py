"""The training command in several processes, without the seconds that torchrun's start takes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mmixer_kernels import train

STARTED = "effective batch size"
"""The words that the first process prints before its first step."""
PATIENCE = 120.0
"""Seconds after which a training counts as hanging."""


@dataclass
class Job:
    """The processes of one training, and what they print."""

    processes: list[BaseProcess]
    logs: list[Path]

    @property
    def log(self) -> Path:
        return self.logs[0]

    def wait_for(self, text: str, seconds: float) -> bool:
        """Waits for the first process to print the text; False when it ends before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.processes[0].is_alive():
            if text in self.log.read_text():
                return True
            time.sleep(0.005)
        return False

    def finish(self, seconds: float) -> list[int | None]:
        """The exit codes; those that are still running by then are killed and have none."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Sends SIGKILL to some of the processes, or to all."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                process.kill()
                process.join()


def start(
    arguments: Sequence[str],
    folder: Path,
    world: int,
    prepare: Callable[[int], None] | None = None,
) -> Job:
    """Starts the command in `world` processes, with the environment that torchrun gives.

    They are forked from a server that has imported already what takes seconds.

    Args:
        folder: where each process's output goes.
        prepare: called with the rank in each process before the command.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmixer_kernels.train", "torch._dynamo", "tyro"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        log.write_text("")
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        process = context.Process(
            target=_run, args=(list(arguments), environment, log, rank, prepare)
        )
        process.start()
        processes.append(process)
    return Job(processes, logs)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    log: Path,
    rank: int,
    prepare: Callable[[int], None] | None,
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        if prepare is not None:
            prepare(rank)
        code = train.main(arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.exit(code)
