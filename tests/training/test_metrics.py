from __future__ import annotations

import pytest
import torch

from mmixer_kernels.training import metrics

LABELS = torch.tensor([0, 0, 0, 1, 1, 3])
PREDICTIONS = torch.tensor([0, 0, 2, 1, 0, 2])


def test_confusion_matrix_has_a_row_a_true_class() -> None:
    confusion = metrics.confusion_matrix(LABELS, PREDICTIONS, 4)
    assert confusion.tolist() == [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_accuracies_by_hand() -> None:
    confusion = metrics.confusion_matrix(LABELS, PREDICTIONS, 4)
    assert metrics.accuracy(confusion) == 3 / 6
    assert metrics.per_class_accuracy(confusion) == [2 / 3, 1 / 2, None, 0.0]


def test_mean_class_accuracy_leaves_out_classes_that_are_only_predicted() -> None:
    confusion = metrics.confusion_matrix(LABELS, PREDICTIONS, 4)
    assert metrics.mean_class_accuracy(confusion) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
