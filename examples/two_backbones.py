"""M-Mixer on two models of one's own: `python examples/two_backbones.py`.

The models may be any modules that make features of a clip's steps. Here they are a ResNet-18 of
torchvision for colour and a network of our own for depth, with random weights where you have
trained ones.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from mmixer_kernels import MMixer
from mmixer_kernels.training.model import Recognizer

CLASSES = 4


class EachFrame(nn.Module):
    """A network of pictures on each frame by itself: `[B, T, C, H, W] -> [B, T, D]`. A network of
    whole clips needs none of this: its features `[B, T', D]` are M-Mixer's inputs as they are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Features of frames."""
        return self.network(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def models() -> list[nn.Module]:
    """The two models, which give 512 and 32 features of each frame."""
    colour = torchvision.models.resnet18()
    colour.fc = nn.Identity()
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    depth = nn.Sequential(nn.Conv2d(1, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU(), *pooled)
    return [EachFrame(colour), EachFrame(depth)]


def samples(count: int) -> tuple[list[Tensor], Tensor]:
    """Clips `[count, 4, 3, 16, 16]` and `[count, 4, 1, 16, 16]`, and their classes `[count]`, which
    both tell together: colour is red or blue, and depth grows or shrinks."""
    labels = torch.randint(CLASSES, (count,))
    colour, depth = torch.randn(count, 4, 3, 16, 16), torch.randn(count, 4, 1, 16, 16)
    colour[:, :, ::2] += torch.stack([labels % 2, 1 - labels % 2], 1)[:, None, :, None, None]
    slope = 2 * (labels // 2) - 1
    depth += (slope[:, None] * torch.linspace(-1, 1, 4))[:, :, None, None, None]
    return [colour, depth], labels


def frozen() -> float:
    """Trains M-Mixer alone, on features that are made once; gives its accuracy on new samples."""
    networks = [model.eval() for model in models()]
    with torch.no_grad():
        clips, labels = samples(64)
        features = [network(x) for network, x in zip(networks, clips, strict=True)]
    mixer = MMixer(feature_sizes=[512, 32], num_classes=CLASSES, hidden_size=32)
    optimizer = torch.optim.Adam(mixer.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(mixer(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        clips, labels = samples(64)
        logits = mixer([network(x) for network, x in zip(networks, clips, strict=True)])
    return (logits.argmax(1) == labels).float().mean().item()


def joint() -> float:
    """Trains M-Mixer and both models together, the models ten times as slowly; gives the accuracy
    on new samples."""
    mixer = MMixer(feature_sizes=[512, 32], num_classes=CLASSES, hidden_size=32)
    recognizer = Recognizer(models(), mixer)
    fast, slow = recognizer.mixer.parameters(), recognizer.extractors.parameters()
    optimizer = torch.optim.Adam([{"params": fast}, {"params": slow, "lr": 1e-3}], 1e-2)
    for _ in range(12):
        clips, labels = samples(16)
        loss = F.cross_entropy(recognizer(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels = samples(64)
    with torch.no_grad():
        logits = recognizer.eval()(clips)
    return (logits.argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"M-Mixer on two frozen models: accuracy {frozen():.1%}")
    print(f"M-Mixer and both models, trained together: accuracy {joint():.1%}")
