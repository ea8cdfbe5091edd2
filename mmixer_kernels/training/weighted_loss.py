"""The loss of training: cross-entropy, where classes may weigh differently."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """A weight per class, `[classes]` float32, inversely proportional to its number of samples:
    samples / (present classes * samples of the class), 0 for a class without samples. So the mean
    weight of a sample is 1.

    Args:
        labels: [samples] int64, those of the training set.
    """
    counts = labels.bincount(minlength=classes).double()
    weights = len(labels) / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 0.0).float()


def summed(
    logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None
) -> Tensor:
    """The sum of the samples' losses, each times the weight of its class where there are weights.

    A step divides it by its number of samples, not by their weights: so each sample weighs the same
    in every batch, and a batch of one class alone, or of one sample, is weighted too. With label
    smoothing the weight is that of the sample's own class.

    Args:
        logits: [B, K].
        labels: [B] int64.
        weights: [K] float32, on the device of the logits.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights[labels]).sum()
