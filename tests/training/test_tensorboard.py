from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmixer_kernels.training.tensorboard import Events


def record(epoch: int, loss: float) -> dict[str, float]:
    return {"epoch": epoch, "loss": loss, "validation_accuracy": 0.5}


def test_a_resumed_training_doubles_no_step(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with Events(tmp_path, 0) as events:
        for epoch in (1, 2, 3):
            events.epoch(record(epoch, epoch / 2))
    time.sleep(1)  # files are read in the order of their names, which begin with a time in seconds
    with Events(tmp_path, 2) as events:  # killed before the checkpoint of the third epoch
        for epoch in (3, 4):
            events.epoch(record(epoch, epoch * 2))
    read = event_accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    scalars = [(event.step, event.value) for event in read.Scalars("training/loss")]
    assert scalars == [(1, 0.5), (2, 1), (3, 6), (4, 8)]
    assert [event.step for event in read.Scalars("validation/accuracy")] == [1, 2, 3, 4]


def test_without_tensorboard_or_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Events(None, 0) as events:
        events.epoch(record(1, 0.5))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Events(tmp_path, 0) as events:
        events.epoch(record(1, 0.5))
    assert list(tmp_path.iterdir()) == []


def test_it_is_imported_by_a_training_only() -> None:
    check = "import sys, mmixer_kernels.train; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
