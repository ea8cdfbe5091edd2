"""A training of a second in this process, and how to interrupt it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from mmixer_kernels.training import loop, model, parsing

TINY = [
    *("--frames", "4", "--frame-size", "8", "--samples", "16", "--evaluation-samples", "16"),
    *("--model.hidden-size", "8", "--model.engine", "reference", "--model.dropout", "0.3"),
    *("--loader.batch-size", "3", "--epochs", "2", "--optimizer.learning-rate", "0.01"),
    *("--optimizer.schedule", "cosine"),
]
STEPS = 6
"""Per epoch."""


def trainer(*more: str) -> loop.Trainer:
    chosen = parsing.parse([*TINY, *more], "train")
    torch.manual_seed(chosen.run.seed)
    data = chosen.load_data()
    built = model.build(chosen.run.model, data)
    return loop.Trainer(chosen, data, model.place(built, chosen.run, torch.device("cpu")))


def interrupt_after(steps: int, trained: loop.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises SIGINT in the middle of a step."""
    inner = trained._train_step
    taken = 0

    def step(*arguments: Any) -> tuple[float, int]:
        nonlocal taken
        taken += 1
        if taken == steps:
            signal.raise_signal(signal.SIGINT)
        return inner(*arguments)

    monkeypatch.setattr(trained, "_train_step", step)
