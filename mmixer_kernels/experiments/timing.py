"""Times of trained networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from ..comparison.timing import torch_threads
from ..data import collate
from ..trained.restore import restore
from ..training import batches

ROUNDS = 15


@dataclass(frozen=True)
class Time:
    """The time of a sample: `steps` of the recurrence, `milliseconds` of forward and backward."""

    steps: int
    milliseconds: float


def of_samples(checkpoints: Sequence[Path]) -> list[Time]:
    """The time of each network on the first batch of its test samples, forward and backward, with
    one thread on a CPU; in turns, so that what disturbs the machine disturbs all."""
    with torch_threads(1):
        return _of_samples(checkpoints)


def _of_samples(checkpoints: Sequence[Path]) -> list[Time]:
    networks = []
    for path in checkpoints:
        restored = restore(path)
        size = min(restored.options.run.loader.batch_size, len(restored.data.test))
        batch = collate([restored.data.test[index] for index in range(size)])
        device = next(restored.model.parameters()).device
        networks.append((restored.model.train(), *batches.to_device(batch, device)))
    seconds: list[list[float]] = [[] for _ in networks]
    for turn in range(ROUNDS + 1):
        for times, (model, inputs, labels, lengths) in zip(seconds, networks, strict=True):
            start = _now(labels.device)
            F.cross_entropy(model(inputs, lengths), labels).backward()
            if turn:  # the first one warms up
                times.append(_now(labels.device) - start)
    return [
        Time(model.features(inputs, lengths)[0].shape[1], 1e3 * median(times) / len(labels))
        for times, (model, inputs, labels, lengths) in zip(seconds, networks, strict=True)
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
