"""DropConnect on a unit's recurrent weights: `python examples/dropconnect.py`"""

import torch
from torch import nn
from torch.func import functional_call

from mmixer_kernels import FusedMCU


class DropConnect(nn.Module):
    """A unit, stack or cell whose recurrent weights are each dropped with probability `p` in
    training, by one mask for all steps of a call, as in AWD-LSTM (Merity et al., 2018)."""

    def __init__(self, unit, p):
        super().__init__()
        self.unit, self.p = unit, p

    def forward(self, *operands, **options):
        recurrent = ("weight_r", "weight_z", "weight_h")  # in a stack a layer's suffix follows
        dropped = {
            name: nn.functional.dropout(weight, self.p, self.training)
            for name, weight in self.unit.named_parameters()
            if name.startswith(recurrent)
        }
        return functional_call(self.unit, dropped, operands, options)


if __name__ == "__main__":
    label = torch.randint(4, (1128,))  # Each step shows it weakly.
    sequence = torch.randn(16, 1128, 4) + 0.5 * nn.functional.one_hot(label, 4)  # [T, B, features]
    for p in (0.0, 0.3):
        unit, linear = DropConnect(FusedMCU(4, 0, 64), p), nn.Linear(64, 4)
        optimizer = torch.optim.Adam([*unit.parameters(), *linear.parameters()], 1e-2)
        for _ in range(50):
            _, h_n = unit(sequence[:, :128])
            optimizer.zero_grad()
            nn.functional.cross_entropy(linear(h_n[0]), label[:128]).backward()
            optimizer.step()
        _, h_n = unit.eval()(sequence[:, 128:])
        print(f"p = {p}: {(linear(h_n[0]).argmax(1) == label[128:]).float().mean():.1%} are right")
