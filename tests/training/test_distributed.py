from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import outcome, unequal
from processes import PATIENCE, STARTED, start

from mmixer_kernels import train
from mmixer_kernels.data import ArraysOptions
from mmixer_kernels.errors import UserError
from mmixer_kernels.trained.evaluation import evaluate
from mmixer_kernels.training import checkpoint

TRAIN, TEST = 21, 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers of samples that no batch here divides; the last one of 4 has a single sample."""
    folder = tmp_path_factory.mktemp("arrays")
    random = np.random.default_rng(0)
    for name, samples in (("train", TRAIN), ("validation", TEST), ("test", TEST)):
        label = np.arange(samples) % 3
        features = {
            modality: random.standard_normal((samples, 5, 4)) + (label == target)[:, None, None]
            for modality, target in (("rgb", 1), ("depth", 2))
        }
        length = random.integers(1, 6, samples)
        np.savez(folder / f"{name}.npz", label=label, length=length, **features)
    return folder


def arguments(root: Path, output: Path, *more: object) -> list[str]:
    given = [
        *("--data", "arrays", "--root", root, "--output", output, "--epochs", 3),
        *("--model.hidden-size", 8, "--model.engine", "reference", *more),
    ]
    return list(map(str, given))


def run(world: int, given: Sequence[str], logs: Path) -> None:
    job = start(given, logs, world)
    assert set(job.finish(PATIENCE)) == {0}, job.log.read_text()


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one process with batches of 4."""
    folder = tmp_path_factory.mktemp("alone")
    assert train.main(arguments(root, folder, "--loader.batch-size", 4)) == 0
    return folder


@pytest.mark.parametrize(
    ("world", "batch_size", "accumulate"), [(2, 2, 1), (1, 2, 2), (2, 1, 2), (3, 1, 1)]
)
def test_the_effective_batch_alone_decides(
    root: Path, alone: Path, tmp_path: Path, world: int, batch_size: int, accumulate: int
) -> None:
    whole = alone
    if world == 3:
        whole = tmp_path / "whole"
        assert train.main(arguments(root, whole, "--loader.batch-size", 3)) == 0
    divided = tmp_path / "divided"
    more = ("--loader.batch-size", batch_size, "--optimizer.accumulate", accumulate)
    run(world, arguments(root, divided, *more), tmp_path)
    ours, theirs = numbers(divided), numbers(whole)
    assert ours["effective_batch_size"] == theirs["effective_batch_size"]
    assert ours["confusion"] == theirs["confusion"]
    assert ours["accuracy"] == theirs["accuracy"]
    # Sums are rounded in another order: some 1e-7 per step, which Adam's first steps pass on.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for our, their in zip(outcome(divided)["records"], outcome(whole)["records"], strict=True):
        assert our == pytest.approx(their, rel=1e-6)
    model, other = (checkpoint.load(folder / "last.pt")["model"] for folder in (divided, whole))
    for name in other:
        torch.testing.assert_close(model[name], other[name], rtol=0, atol=1e-6)
    # The same weights evaluated by one process in the same batches: the same to the last bit.
    report = evaluate(divided / "best.pt", "test")
    for name in ("samples", "confusion", "accuracy", "loss"):
        assert report[name] == ours[name]
    assert report["samples"] == TEST


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays of three classes, the rarest with a tenth of the samples."""
    folder = tmp_path_factory.mktemp("skewed")
    random = np.random.default_rng(0)
    for name, counts in (("train", (12, 6, 2)), ("validation", (2, 2, 2)), ("test", (4, 4, 4))):
        label = np.repeat((0, 1, 2), counts)
        features = {
            modality: random.standard_normal((len(label), 5, 4)) + label[:, None, None]
            for modality in ("rgb", "depth")
        }
        length = random.integers(1, 6, len(label))
        np.savez(folder / f"{name}.npz", label=label, length=length, **features)
    return folder


WEIGHTS, SAMPLING = ("--loss.class-weights", "balanced"), ("--loader.sampling", "balanced")


@pytest.mark.parametrize("option", [WEIGHTS, SAMPLING])
def test_skewed_classes_are_made_even_alike_however_a_step_is_divided(
    skewed: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    alone, added_up, divided, plain = (tmp_path / name for name in ("1", "2", "3", "4"))
    more = (*option, "--optimizer.label-smoothing", 0.1)
    assert train.main(arguments(skewed, alone, *more, "--loader.batch-size", 6)) == 0
    twice = (*more, "--loader.batch-size", 3, "--optimizer.accumulate", 2)
    assert train.main(arguments(skewed, added_up, *twice)) == 0
    run(2, arguments(skewed, divided, *more, "--loader.batch-size", 3), tmp_path / "logs")
    for other in (added_up, divided):
        pairs = zip(outcome(other)["records"], outcome(alone)["records"], strict=True)
        assert all(our == pytest.approx(their, rel=1e-6) for our, their in pairs)
        model, expected = (checkpoint.load(x / "last.pt")["model"] for x in (other, alone))
        for name in expected:
            torch.testing.assert_close(model[name], expected[name], rtol=0, atol=1e-6)
    smooth = ("--optimizer.label-smoothing", 0.1, "--loader.batch-size", 6)
    assert train.main(arguments(skewed, plain, *smooth)) == 0
    ours, theirs = outcome(alone)["records"][0], outcome(plain)["records"][0]
    assert ours["loss"] != pytest.approx(theirs["loss"], rel=1e-3)
    # The weights are for training alone: a test is what evaluate says of the same network.
    assert evaluate(alone / "best.pt", "test")["loss"] == numbers(alone)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["0", "0.0001"])
def test_extractors_of_several_processes_have_their_rate_too(tmp_path: Path, rate: str) -> None:
    """The last step of 16 samples has one, and leaves two processes of three without."""
    given = [
        *("--samples", "16", "--evaluation-samples", "16", "--frames", "4", "--frame-size", "8"),
        *("--epochs", "2", "--model.hidden-size", "8", "--model.engine", "reference"),
        *("--optimizer.extractor-rate", rate, "--model.gradient-checkpointing"),
    ]
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    assert train.main([*given, "--output", str(whole), "--loader.batch-size", "15"]) == 0
    run(3, [*given, "--output", str(divided), "--loader.batch-size", "5"], tmp_path)
    assert "learning rate 0.001, of the extractors" in (tmp_path / "0.log").read_text()
    for our, their in zip(outcome(divided)["records"], outcome(whole)["records"], strict=True):
        assert our == pytest.approx(their, rel=1e-5)
    model, other = (checkpoint.load(folder / "last.pt")["model"] for folder in (divided, whole))
    for name in other:
        torch.testing.assert_close(model[name], other[name], rtol=0, atol=1e-5)


def interrupt_second(rank: int) -> None:
    """Process 1 gets SIGTERM in the middle of its fifth step."""
    from mmixer_kernels.training import loop

    inner = loop.Trainer._loss
    batches = 0

    def loss(self: loop.Trainer, batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if rank == 1 and batches == 5:
            signal.raise_signal(signal.SIGTERM)
        return inner(self, batch)

    loop.Trainer._loss = loss  # type: ignore[method-assign]


DROPOUT = ("--model.dropout", 0.3, "--loader.batch-size", 2)


def test_a_signal_to_one_process_stops_all_at_the_same_step(root: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    run(2, arguments(root, whole, *DROPOUT), tmp_path / "1")
    job = start(arguments(root, stopped, *DROPOUT), tmp_path / "2", 2, interrupt_second)
    assert job.finish(PATIENCE) == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM; go on with" in job.logs[0].read_text()
    assert job.logs[1].read_text() == ""
    assert not (stopped / "previous.pt").exists()
    state = checkpoint.load(stopped / "last.pt")
    assert (state["epoch"], state["step"], state["processes"]) == (0, 5, 2)
    first, second = state["random"]
    assert not torch.equal(first, second)
    run(2, ["--output", str(stopped), "--resume"], tmp_path / "3")
    assert unequal(outcome(stopped), outcome(whole)) == []


@pytest.mark.slow
def test_a_signal_in_an_epoch_of_even_classes_leaves_no_trace(skewed: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    more = (*DROPOUT, *SAMPLING, "--loader.batch-size", 1)
    run(2, arguments(skewed, whole, *more), tmp_path / "1")
    job = start(arguments(skewed, stopped, *more), tmp_path / "2", 2, interrupt_second)
    assert job.finish(PATIENCE) == [128 + signal.SIGTERM] * 2
    state = checkpoint.load(stopped / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 5)
    run(2, ["--output", str(stopped), "--resume"], tmp_path / "3")
    assert unequal(outcome(stopped), outcome(whole)) == []


def test_resume_needs_the_same_processes_and_batch(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--output", str(alone), "--resume", "--loader.batch-size", "2"]) == 2
    assert "--loader.batch-size was 4, is 2" in capsys.readouterr().err
    job = start(["--output", str(alone), "--resume"], tmp_path, 2)
    assert job.finish(PATIENCE) == [2, 2]
    error = job.logs[0].read_text()
    assert error.startswith("error: --resume needs the 1 processes of")
    assert error.count("\n") == 1
    assert job.logs[1].read_text() == ""


def unreadable_for_second(rank: int) -> None:
    if rank == 1:

        def load(*arguments: Any) -> None:
            raise OSError("disk 7 is gone")

        ArraysOptions.load = load  # type: ignore[method-assign]


def test_one_process_with_an_error_ends_all_and_tells_it(root: Path, tmp_path: Path) -> None:
    given = arguments(root, tmp_path / "run")
    job = start(given, tmp_path, 2, unreadable_for_second)
    assert job.finish(PATIENCE) == [2, 2]
    assert job.logs[0].read_text().startswith("device cpu (")
    assert job.logs[0].read_text().count("\n") == 1
    assert job.logs[1].read_text() == "error: process 1: disk 7 is gone\n"


def fails_in_second(rank: int) -> None:
    from mmixer_kernels.training import loop

    inner = loop.Trainer._loss

    def loss(self: loop.Trainer, batch: Any) -> Any:
        if rank == 1 and self.step == 3:
            raise UserError("sample 12 is damaged")
        return inner(self, batch)

    loop.Trainer._loss = loss  # type: ignore[method-assign]


def test_an_error_in_one_process_leaves_none_hanging(root: Path, tmp_path: Path) -> None:
    job = start(arguments(root, tmp_path / "run", *DROPOUT), tmp_path, 2, fails_in_second)
    first, second = job.finish(PATIENCE)
    assert first not in (None, 0)
    assert second == 2
    assert job.logs[1].read_text().endswith("error: sample 12 is damaged\n")


def not_finite(rank: int) -> None:
    from mmixer_kernels.training import loop

    inner = loop.Trainer._loss

    def loss(self: loop.Trainer, batch: Any) -> Any:
        value, correct = inner(self, batch)
        return value * (float("nan") if rank == 1 and self.step == 3 else 1), correct

    loop.Trainer._loss = loss  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(root: Path, tmp_path: Path) -> None:
    job = start(arguments(root, tmp_path / "run", *DROPOUT), tmp_path, 2, not_finite)
    assert job.finish(PATIENCE) == [2, 2]
    assert "error: the training loss is nan in epoch 1 at step 4 of 6" in job.logs[0].read_text()
    assert job.logs[1].read_text() == ""


@pytest.mark.slow
def test_torchrun_starts_it(root: Path, tmp_path: Path) -> None:
    """torchrun gives the bits of processes that tests start; wrong options are told once."""
    ours, theirs = tmp_path / "torchrun", tmp_path / "processes"
    torchrun = [*(sys.executable, "-m", "torch.distributed.run"), "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "mmixer_kernels.train", *arguments(root, ours, *DROPOUT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(STARTED) == 1
    assert done.stdout.count("test: accuracy") == 1
    run(2, arguments(root, theirs, *DROPOUT), tmp_path)
    assert unequal(outcome(ours), outcome(theirs)) == []
