"""The passes that are timed: a forward, and a forward with the gradients of all operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .timing import Contender


@dataclass(frozen=True)
class Forward:
    """A module's forward where no gradient is needed."""

    module: Callable[..., Any]
    operands: Sequence[Tensor]

    def __call__(self) -> None:
        with torch.no_grad():
            self.module(*self.operands)


@dataclass(frozen=True)
class ForwardBackward:
    """A forward, and the gradients of the operands and the parameters from those of the output.

    Of a tuple, the first entry is the output; a list is several outputs.
    """

    module: Callable[..., Any]
    operands: Sequence[Tensor]
    parameters: Sequence[Tensor]

    def __call__(self) -> None:
        output = self.module(*self.operands)
        output = output[0] if isinstance(output, tuple) else output
        outputs = output if isinstance(output, list) else [output]
        directions = [_ones(x.shape, x.device, x.dtype) for x in outputs]
        torch.autograd.grad(outputs, [*self.operands, *self.parameters], directions)


FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
RECORDED = "forward, gradients on"
"""A forward that leaves what backward needs, which does not come."""


def contender(
    name: str, module: Callable[..., Any], operands: Sequence[Tensor], passes: str
) -> Contender:
    """A call of a module, or of a function of its operands alone; on a GPU one that does not wait
    for its work. passes is one of `PASSES`, or `RECORDED`."""
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    calls: dict[str, Callable[[], object]] = {
        FORWARD: Forward(module, operands),
        RECORDED: functools.partial(module, *operands),
        FORWARD_BACKWARD: ForwardBackward(module, operands, parameters),
    }
    return Contender(name, calls[passes])


@functools.cache
def _ones(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones(shape, device=device, dtype=dtype)
