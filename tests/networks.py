"""A network of frames that is small, where the network is not what a test is about."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

FEATURE_SIZE = 512


class TinyResNet(nn.Module):
    """A stand-in for a ResNet: a convolution, a batch norm with its statistics, features of a
    ResNet's size and a classifier, under torchvision's names."""

    kernel = 5

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, FEATURE_SIZE, self.kernel, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(FEATURE_SIZE)
        self.fc: nn.Module = nn.Linear(FEATURE_SIZE, 1000)

    def forward(self, frames: Tensor) -> Tensor:
        return self.fc(self.bn1(self.conv1(frames)).relu().mean((2, 3)))


def shrink_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torchvision's get_model give a TinyResNet, whatever it is asked for."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: TinyResNet())
