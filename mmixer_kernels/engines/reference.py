"""The reference engine: plain PyTorch, any device, any dtype. Saves nothing, computes again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import Weights
from .state import EngineState


def state(device: torch.device | None = None) -> EngineState:
    return EngineState(True, "plain PyTorch")


def unsupported(input: Tensor) -> str | None:
    return None


def saved_size(inputs: list[Tensor], hidden_size: int, recompute: bool) -> int:
    """Number of elements that `forward` saves for `backward`."""
    return 0


def forward(
    inputs: list[Tensor],
    contexts: list[Tensor],
    weights: list[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
    save: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """G weight sets over a sequence: output `[G, T, B, H]`, h_n `[G, B, H]`, saved."""
    output, h_n = reference.mcu_group(inputs, contexts, weights, hx, lengths, mix=mix, eps=eps)
    return output, h_n, output.new_empty(0, dtype=reference.compute_dtype(output.dtype))


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    inputs: list[Tensor],
    contexts: list[Tensor],
    weights: list[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    saved: Tensor,
    mix: str,
    eps: float,
    recompute: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Weights], Tensor]:
    """Gradients of inputs (empty unless needed), contexts, weights (likewise), hx `[G, B, H]`."""
    results = [
        reference.mcu_backward(dy, dh, x, context, w, h_0, lengths, mix=mix, eps=eps)
        for dy, dh, x, context, w, h_0 in zip(
            grad_output, grad_h_n, inputs, contexts, weights, _each(hx, inputs), strict=True
        )
    ]
    grad_inputs, grad_contexts, grad_weights, grad_hx = (
        list(x) for x in zip(*results, strict=True)
    )
    return (
        grad_inputs if need_input else [],
        grad_contexts,
        grad_weights if need_weights else [],
        torch.stack(grad_hx),
    )


def _each(hx: Tensor | None, inputs: list[Tensor]) -> list[Tensor | None]:
    return [None] * len(inputs) if hx is None else list(hx)
