"""The reference engine: plain PyTorch, any device, any dtype. It keeps nothing for backward, which
computes everything again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import Cotangents, Gradients, Keep, Need, Problem
from .protocol import EngineState

NAME = "reference"
DEVICES: tuple[str, ...] = ()


def state(device: torch.device | None = None) -> EngineState:
    """The state of the engine, which is always available."""
    return EngineState(True, "plain PyTorch")


def saved_size(problem: Problem, keep: Keep) -> int:
    """Nothing."""
    return 0


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and an empty tensor for `backward`."""
    output, h_n = reference.mcu_group(problem)
    return output, h_n, output.new_empty(0, dtype=problem.compute_dtype)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, by ordinary operations, so that they can be differentiated again."""
    groups = zip(*cotangents.filled(problem), reference.each_group(problem), strict=True)
    results = [
        reference.mcu_backward(dy, dh, *operands, **keywords)
        for dy, dh, (operands, keywords) in groups
    ]
    grads = [list(each) for each in zip(*results, strict=True)]
    return Gradients(
        grads[0] if need.input else [],
        grads[1] if problem.has_context else [],
        grads[2] if need.weights else [],
        torch.stack(grads[3]),
    )
