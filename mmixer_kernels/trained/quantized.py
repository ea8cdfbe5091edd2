"""A trained network with int8 weights in its units."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from ..errors import UserError
from ..modules import FusedMCU
from ..quantized import QuantizedMCUCell
from ..training import loop
from ..training.model import Recognizer
from ..training.options import LoaderOptions


class Stepped(nn.Module):
    """A cell that goes through sequences step by step, as one of `MMixer.units`."""

    def __init__(self, cell: QuantizedMCUCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(
        self, input: Tensor, context: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output `[T, B, H]` and h_n `[1, B, H]` of input `[T, B, input_size]`; past a sample's
        length its state stands still, and its output is 0."""
        state = input.new_zeros(input.shape[1], self.cell.hidden_size)
        output = []
        for t, x in enumerate(input):
            following = self.cell(x, context, state)
            valid = (
                torch.ones_like(state[:, :1], dtype=torch.bool)
                if lengths is None
                else (t < lengths)[:, None]
            )
            state = torch.where(valid, following, state)
            output.append(torch.where(valid, following, 0.0))
        return torch.stack(output), state.unsqueeze(0)


def evaluate(
    model: Recognizer, split: Split, classes: int, loader: LoaderOptions, device: str
) -> dict[str, Any]:
    """The `Evaluation.summary()` over a split of a copy of the model whose units have int8 weights.

    Raises:
        UserError: units other than MCUs, or a device that is no CPU.
    """
    units = list(model.mixer.units)
    if not all(isinstance(unit, FusedMCU) for unit in units):
        raise UserError('--quantized needs a network whose units are MCUs (--model.unit "mcu")')
    if torch.device(device).type != "cpu":
        raise UserError("--quantized needs --device cpu, where alone there are int8 weights")
    narrow = copy.deepcopy(model)
    cells = [unit.quantized() for unit in units if isinstance(unit, FusedMCU)]
    narrow.mixer.units = nn.ModuleList(map(Stepped, cells))
    return loop.evaluate(narrow, split, classes, loader).summary()
