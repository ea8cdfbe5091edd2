"""The accuracy that a network has left at test time when one modality is absent or noised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Sample, Split
from ..data.base import draws
from ..training import batches, distributed, loop
from ..training.options import LoaderOptions

LEVELS = (0.5, 1.0, 2.0)
"""Standard deviations of the noise, as multiples of that of the modality's inputs."""
KEY = (0, 3)
"""Seed and split of the noise's draws; no data set draws from split 3."""


class Degraded(Split):
    """The samples of a split with one modality's inputs zeros, or with white noise added to them.

    The noise of a sample depends on (index, modality, noise) alone: it is the same draw of
    deviation 1 for every `noise`, multiplied by it. Padding stays as it is.

    Args:
        split: one whose samples do not change, as those for validation and test.
        modality: the modality's place in a sample's inputs.
        noise: standard deviation of the noise; None for zeros.
    """

    def __init__(self, split: Split, modality: int, noise: float | None) -> None:
        super().__init__(split.labels)
        self.split, self.modality, self.noise = split, modality, noise

    def __getitem__(self, index: int) -> Sample:
        sample = self.split[index]
        inputs = list(sample.inputs)
        inputs[self.modality] = self._degraded(inputs[self.modality], sample.length, index)
        return sample._replace(inputs=tuple(inputs))

    def _degraded(self, x: Tensor, length: int, index: int) -> Tensor:
        if self.noise is None:
            return torch.zeros_like(x)
        random = draws(*KEY, epoch=0, index=index, purpose=self.modality)
        noised = x.clone()
        noise = random.standard_normal(noised[:length].shape, dtype="float32")
        noised[:length] += self.noise * torch.from_numpy(noise)
        return noised


def evaluate(
    model: nn.Module,
    split: Split,
    modalities: Sequence[str],
    classes: int,
    loader: LoaderOptions,
    precision: str = "float32",
) -> dict[str, Any]:
    """The `Evaluation.summary()` of a model over a split, for each modality and what befalls it.

    By modality: "absent", its inputs are zeros, what a dead sensor delivers after the data set's
    normalisation; "noise", by level ("0.5", "1", "2"), white noise is added whose standard
    deviation is so many times that of the modality's inputs. Every number takes a pass over the
    split, and the deviations one more. Several processes share a pass as in `loop.evaluate`, and
    the result is the same to the last bit.

    Args:
        model: the network.
        split: the samples.
        modalities: names, in the order of a sample's inputs.
        classes: K.
        loader: the size of a batch, and the workers.
        precision: that of `RunOptions`.
    """

    def summary(modality: int, noise: float | None) -> dict[str, float]:
        degraded = Degraded(split, modality, noise)
        return loop.evaluate(model, degraded, classes, loader, precision).summary()

    spread = deviations(split, loader)
    return {
        name: {
            "absent": summary(place, None),
            "noise": {f"{level:g}": summary(place, level * deviation) for level in LEVELS},
        }
        for place, (name, deviation) in enumerate(zip(modalities, spread, strict=True))
    }


def deviations(split: Split, loader: LoaderOptions) -> list[float]:
    """The standard deviation of each modality's values in the valid steps of a split."""
    # Sums of differences from one value: a modality that never changes has exactly 0.
    origins = [x.flatten()[0].double() for x in split[0].inputs]
    order = batches.in_order(len(split), loader.batch_size)
    own = order[distributed.rank() :: distributed.world()]
    sums: list[list[tuple[int, float, float]]] = [[] for _ in origins]
    for inputs, _, lengths in batches.load(split, own, loader.workers):
        for x, origin, parts in zip(inputs, origins, sums, strict=True):
            if lengths is not None:
                x = x[torch.arange(x.shape[1]) < lengths[:, None]]
            difference = x.double() - origin
            parts.append((x.numel(), difference.sum().item(), difference.square().sum().item()))
    gathered = distributed.gather(sums)
    return [
        _deviation([part for process in gathered for part in process[place]])
        for place in range(len(origins))
    ]


def _deviation(sums: Sequence[tuple[int, float, float]]) -> float:
    """The deviation of values whose parts have these counts, sums and sums of squares; their order
    does not matter."""
    count, total, squares = (math.fsum(column) for column in zip(*sums, strict=True))
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def describe(report: dict[str, Any]) -> str:
    """The accuracies of an evaluation's report with "missing" as a table, a row per modality."""
    header = ["accuracy", "all there", "absent", *(f"noise {level:g}" for level in LEVELS)]
    rows = [header]
    for modality, cases in report["missing"].items():
        summaries = [report, cases["absent"], *cases["noise"].values()]
        rows.append([modality, *(f"{summary['accuracy']:.2%}" for summary in summaries)])
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in cells)]) for name, *cells in rows
    )
