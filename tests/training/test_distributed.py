from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_and_resume import outcome
from processes import PATIENCE, start

from mmixer_kernels import train
from mmixer_kernels.training import checkpoint
from mmixer_kernels.training.run import evaluate

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
    # Sums are rounded in another order: some 1e-7 a step, which Adam's first steps pass on.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for our, their in zip(outcome(divided)["records"], outcome(whole)["records"], strict=True):
        assert our == pytest.approx(their, rel=1e-6)
    model, other = (checkpoint.load(folder / "last.pt")["model"] for folder in (divided, whole))
    for name in other:
        torch.testing.assert_close(model[name], other[name], rtol=0, atol=1e-6)
    # The same weights evaluated by one process in the same batches: the same to the last bit.
    report = evaluate(divided / "best.pt", "test", None, None, None)
    for name in ("samples", "confusion", "accuracy", "loss"):
        assert report[name] == ours[name]
    assert report["samples"] == TEST
