"""The operations of the ops' matrix products, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def tell_counters() -> None:
    """Gives the formulas to the counters that look on. They are registered no earlier, since to
    import torch.utils.flop_counter imports Triton; a counter copies the registry when it is made.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    ops = torch.ops.mmixer_kernels
    if ops.mcu_forward not in module.flop_registry:
        module.register_flop_formula(ops.mcu_forward)(forward)
        module.register_flop_formula(ops.mcu_backward)(backward)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", {})
        for op in (ops.mcu_forward, ops.mcu_backward):
            registry.setdefault(op, module.flop_registry[op])


def forward(
    inputs: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]],
    weights: Sequence[Sequence[int]],
    *arguments: Any,
    out_shape: Any = None,
) -> int:
    """The operations of Equations 7-9, 11, 12 and 14, from shapes: two for each product of a
    weight."""
    H = weights[-1][-1]
    total = sum(2 * B * T * (H * F + 3 * H * H) for T, B, F in inputs)  # f, and r, z, h
    for (T, B, _), (_, C) in zip(inputs, contexts, strict=bool(contexts)):
        # The half of s that f_bar has, at each step; once g, and the other half of s.
        total += 2 * B * (T * H * H + H * C + H * H)
    return total


def backward(
    grad_output: Sequence[int],
    grad_h_n: Sequence[int],
    saved: Sequence[int],
    inputs: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]],
    weights: Sequence[Sequence[int]],
    *arguments: Any,
    out_shape: Any = None,
) -> int:
    """The operations of a product for each gradient of an operand and each of a weight, and of the
    forward again where it did not keep the gates."""
    engine, keep, need_input, need_weights = arguments[-4:]
    products = forward(inputs, contexts, weights)
    H = weights[-1][-1]
    of_inputs = sum(2 * T * B * H * F for T, B, F in inputs)
    total = products * (2 if need_weights else 1)
    total -= 0 if need_input else of_inputs
    return total + (0 if keep == "gates" and engine != "reference" else products)
