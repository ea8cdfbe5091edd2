"""Accuracies from a confusion matrix `[K, K]` int64: rows are true classes, columns predicted."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """The counts `[K, K]` of labels `[samples]` against predictions `[samples]`, both int64 in
    0..K-1."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(
        classes, classes
    )


def accuracy(confusion: Tensor) -> float:
    """Top-1 accuracy: the fraction of the samples whose prediction is correct."""
    return confusion.diagonal().sum().item() / confusion.sum().item()


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """The fraction of each class's samples whose prediction is correct; None for a class without
    samples."""
    correct, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    return [right / total if total else None for right, total in zip(correct, totals, strict=True)]


def mean_class_accuracy(confusion: Tensor) -> float:
    """The mean of the accuracies of the classes that have samples."""
    present = [value for value in per_class_accuracy(confusion) if value is not None]
    return sum(present) / len(present)
