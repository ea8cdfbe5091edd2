"""Features brought to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Moments


class Standardize(nn.Module):
    """Brings each feature to the mean 0 and the standard deviation 1 of a training set.

    Args:
        modalities: the modalities, in the order of the inputs.
        moments: each modality's mean and standard deviation, `[D]`, as `Data.moments` has them.
    """

    def __init__(self, modalities: Sequence[str], moments: Moments) -> None:
        super().__init__()
        for i, name in enumerate(modalities):
            mean, deviation = (torch.tensor(x, dtype=torch.float64) for x in moments[name])
            self.register_buffer(f"mean_{i}", mean)
            self.register_buffer(f"deviation_{i}", deviation)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Standardized features, in the inputs' dtype, of a tensor `[..., D]` per modality."""
        return tuple(self.of(i, x) for i, x in enumerate(inputs))

    def of(self, i: int, x: Tensor) -> Tensor:
        """Standardized features of the modality i; computed in float64, as a feature's mean may be
        many times its deviation."""
        mean, deviation = self.get_buffer(f"mean_{i}"), self.get_buffer(f"deviation_{i}")
        return ((x.double() - mean) / deviation).to(x.dtype)

    def inverse(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The features that `forward` makes these of, in the inputs' dtype."""
        features = []
        for i, x in enumerate(inputs):
            mean, deviation = self.get_buffer(f"mean_{i}"), self.get_buffer(f"deviation_{i}")
            features.append((x.double() * deviation + mean).to(x.dtype))
        return features
