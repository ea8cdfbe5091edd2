"""M-Mixer on two models of your own, frozen or trained along: `python examples/two_backbones.py`"""

import torch
from torch import nn
from torchvision.models import resnet18

from mmixer_kernels import MMixer
from mmixer_kernels.training.model import Recognizer


class EachFrame(nn.Sequential):
    """A model of pictures for every frame of clips: `[B, T, C, H, W] -> [B, T, features]`."""

    def forward(self, clips):
        return super().forward(clips.flatten(0, 1)).mean((2, 3)).unflatten(0, clips.shape[:2])


def samples(count):
    """Clips that tell the class together: colour is red or blue, and depth grows or shrinks."""
    label = torch.randint(4, (count,))
    colour, depth = torch.randn(count, 4, 3, 16, 16), torch.randn(count, 4, 1, 16, 16)
    colour[:, :, ::2] += torch.stack([label % 2, 1 - label % 2], 1)[:, None, :, None, None]
    depth += ((2 * (label // 2) - 1)[:, None] * torch.linspace(-1, 1, 4))[:, :, None, None, None]
    return [colour, depth], label


for way in ("frozen", "trained along"):
    colour = EachFrame(*list(resnet18().children())[:5])  # where yours has been trained
    depth = EachFrame(nn.Conv2d(1, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU())
    network = Recognizer([colour, depth], MMixer([64, 32], num_classes=4, hidden_size=32))
    if way == "frozen":
        network.freeze()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        clips, label = samples(16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(clips), label).backward()
        optimizer.step()
    clips, label = samples(64)
    print(f"{way}: {(network.eval()(clips).argmax(1) == label).float().mean():.1%} are right")
