"""DropConnect on a unit's recurrent weights: `python examples/dropconnect.py`.

The weights are dropped before the call, one mask for all its steps, as in the AWD-LSTM of Merity
et al. (2018). So the engines compute what they always compute, of other weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmixer_kernels import FusedMCU

RECURRENT = ("weight_r", "weight_z", "weight_h")
"""The matrices that multiply the state; in a stack their names go on with the layer's."""


class DropConnect(nn.Module):
    """A `FusedMCU`, `FusedMCUCell` or `FusedMCUStack` whose calls in training see recurrent weights
    of which each element is 0 with probability `p`, and else 1 / (1 - p) times itself.

    Its calls are those of the unit: it may stand among an `MMixer`'s units, too.
    """

    def __init__(self, unit: nn.Module, p: float) -> None:
        super().__init__()
        self.unit, self.p = unit, p

    def forward(self, *operands: Any, **options: Any) -> Any:
        """The unit's results."""
        dropped = {
            name: F.dropout(weight, self.p, self.training)
            for name, weight in self.unit.named_parameters()
            if name.startswith(RECURRENT)
        }
        return functional_call(self.unit, dropped, operands, options)


def samples(count: int, steps: int = 16, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Noise `[steps, count, classes]` in which each step is a weak sign of the class `[count]`."""
    labels = torch.randint(classes, (count,))
    return torch.randn(steps, count, classes) + 0.5 * F.one_hot(labels, classes), labels


def train(p: float) -> float:
    """The accuracy on new samples after a short training."""
    torch.manual_seed(0)
    unit, classifier = DropConnect(FusedMCU(4, 0, 64), p), nn.Linear(64, 4)
    optimizer = torch.optim.Adam([*unit.parameters(), *classifier.parameters()], 1e-2)
    input, labels = samples(128)
    for _ in range(50):
        _, h_n = unit(input)
        loss = F.cross_entropy(classifier(h_n[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unit.eval()
    input, labels = samples(1000)
    with torch.no_grad():
        _, h_n = unit(input)
    return (classifier(h_n[0]).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":  # The task is too small to show whether it helps.
    for p in (0.0, 0.3):
        print(f"p = {p}: accuracy {train(p):.1%}")
