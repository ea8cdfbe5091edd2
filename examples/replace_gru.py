"""An nn.GRU in a model, and a FusedMCUStack in its place: `python examples/replace_gru.py`"""

import torch
from torch import nn

from mmixer_kernels import FusedMCUStack


class Classifier(nn.Module):
    """Logits `[B, 4]` of sequences `[B, T, 2]`, from the last state of a recurrent layer."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.linear = recurrent, nn.Linear(32, 4)

    def forward(self, sequence):
        _, h_n = self.recurrent(sequence)
        return self.linear(h_n[-1])


def samples(count, steps=24):
    """Noisy points that circle to the left or to the right, slowly or fast: four classes."""
    label = torch.randint(4, (count,))
    speed = torch.tensor([-0.6, -0.3, 0.3, 0.6])[label, None]
    angle = 6.3 * torch.rand(count, 1) + speed * torch.arange(steps)
    circle = torch.stack([angle.cos(), angle.sin()], 2)
    return circle + 0.3 * torch.randn(circle.shape), label


for recurrent in (nn.GRU(2, 32, batch_first=True), FusedMCUStack(2, 0, 32, batch_first=True)):
    model = Classifier(recurrent)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        sequence, label = samples(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(sequence), label).backward()
        optimizer.step()
    sequence, label = samples(500)
    right = (model(sequence).argmax(1) == label).float().mean()
    print(f"{type(recurrent).__name__}: {right:.1%} of new sequences are right")
