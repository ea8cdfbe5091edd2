from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmixer_kernels.training import weighted_loss

LABELS = torch.tensor([0] * 12 + [1] * 6 + [3] * 2)


def test_weights_are_inverse_frequencies_with_a_mean_of_1() -> None:
    weights = weighted_loss.class_weights(LABELS, 4)
    assert weights.tolist() == pytest.approx([20 / 36, 20 / 18, 0, 20 / 6])
    assert weights[LABELS].mean().item() == pytest.approx(1)
    even = weighted_loss.class_weights(torch.arange(12) % 3, 3)
    assert even.tolist() == [1, 1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_has_the_weight_of_its_sample_s_class(smoothing: float) -> None:
    logits, weights = torch.randn(20, 4), weighted_loss.class_weights(LABELS, 4)
    expected = sum(
        weights[label] * F.cross_entropy(row[None], label[None], label_smoothing=smoothing)
        for row, label in zip(logits, LABELS, strict=True)
    )
    found = weighted_loss.summed(logits, LABELS, smoothing, weights)
    torch.testing.assert_close(found, expected)
    plain = F.cross_entropy(logits, LABELS, reduction="sum", label_smoothing=smoothing)
    assert torch.equal(weighted_loss.summed(logits, LABELS, smoothing, None), plain)
