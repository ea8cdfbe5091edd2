"""The interface of a data set to training: samples, splits, and what goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

UNKNOWN = -1
"""The label of a sample whose class is not known, as of one to predict."""
Moments = dict[str, tuple[list[float], list[float]]]
"""The mean and the standard deviation of each feature, `[D]` each, by modality."""


class Sample(NamedTuple):
    """A single clip."""

    inputs: tuple[Tensor, ...]
    """A tensor `[T, ...]` float32 per modality."""
    label: int
    """The class, from 0 on; -1 where it is not known."""
    length: int
    """The valid steps, 1..T."""


class Batch(NamedTuple):
    """Samples side by side."""

    inputs: list[Tensor]
    """A tensor `[B, T, ...]` per modality, zeros past a sample's length."""
    labels: Tensor
    """`[B]` int64."""
    lengths: Tensor | None
    """`[B]` int64; None when every sample has all T steps."""


class Split(Dataset[Sample]):
    """Samples by index, each one determined by (seed, epoch, index).

    Args:
        labels: `[samples]` int64, known without loading any sample.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's random draws; nothing to choose in splits that never change."""

    def plain(self) -> Split:
        """The samples without augmentation: the split itself, where it has none."""
        return self


@dataclass(frozen=True)
class Data:
    """A data set: its three splits and how each modality becomes features.

    When samples differ in length an extractor treats each step by itself; when T' is not T, every
    sample has all T steps.
    """

    modalities: tuple[str, ...]
    """Names, in the order of a sample's inputs."""
    classes: tuple[str, ...]
    """The K names of the classes."""
    train: Split
    """The samples to learn from."""
    validation: Split
    """The samples by which an epoch is selected."""
    test: Split
    """The samples of the result."""
    extractors: list[nn.Module] | None
    """A module per modality, `[B, T, ...] -> [B, T', feature_sizes[i]]`, which is `nn.Identity`
    where the inputs are features already. None says that the inputs are frames `[B, T, 3, H, W]`,
    for a network that the model's options choose: one of video needs `steps`."""
    feature_sizes: tuple[int, ...] | None
    """The size of each modality's features; None beside extractors that are None."""
    moments: Moments | None = None
    """The moments that inputs were standardized by; samples from elsewhere need the same."""
    steps: int | None = None
    """T, where it is known to be the same for every sample."""
    forms: dict[str, str] | None = None
    """The forms of the frames by modality, where files told them; samples from elsewhere need the
    same."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples side by side; inputs shorter than the longest are padded with zeros."""
    inputs = [
        nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
        for clips in zip(*(sample.inputs for sample in samples), strict=True)
    ]
    labels = torch.tensor([sample.label for sample in samples])
    lengths = torch.tensor([sample.length for sample in samples])
    full = bool((lengths == inputs[0].shape[1]).all())
    return Batch(inputs, labels, None if full else lengths)


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """The samples to validate on, True in bool `[samples]`: a share of each class that has two
    samples or more, and at least one of them.

    Args:
        labels: [samples] int64.
    """
    random = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        indices = (labels == label).nonzero()[:, 0]
        count = min(max(round(share * len(indices)), 1), len(indices) - 1)
        held[indices[torch.randperm(len(indices), generator=random)[:count]]] = True
    return held


def draws(seed: int, split: int, epoch: int, index: int, purpose: int = 0) -> np.random.Generator:
    """Random numbers that depend on where they are used, and on nothing drawn before."""
    return np.random.Generator(
        np.random.Philox(key=(seed, split), counter=(0, purpose, index, epoch))
    )
