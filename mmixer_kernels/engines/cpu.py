"""The CPU engine: hand-written C++ (`csrc/cpu`), float32 and float64.

bfloat16 and float16 tensors are computed in float32; bfloat16 weights are read as they are, the
rest is converted first. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step, compute_dtype
from . import native
from .protocol import EngineState

NAME = "cpu"
CHECKS = True
DEVICES: tuple[str, ...] = ("cpu",)
_WIDE = (torch.float32, torch.float64)
"""The dtypes in which the extension computes."""

_native: Any
try:
    from .. import _native  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _native = None
    _reason = f"the extension mmixer_kernels._native cannot load: {error}"
    _state = EngineState(False, _reason, error)
else:
    _state = EngineState(True, f"C++, {_native.build_info()['instruction_set']}")


def state(device: torch.device | None = None) -> EngineState:
    """Whether the extension loads, and for which instruction set."""
    return _state


def saved_size(problem: Problem, keep: Keep) -> int:
    """Number of elements that `forward` leaves for `backward`: `Saved` of csrc/cpu/buffers.h.

    Computed here too, since under torch.compile the sizes are symbols.
    """
    if keep == "nothing":
        return 0
    groups, steps, batch, hidden = problem.sizes
    lanes = 64 // problem.compute_dtype.itemsize

    def padded(size: int) -> int:
        return (size + lanes - 1) // lanes * lanes

    rows = steps * batch
    if keep == "states":
        return groups * rows * padded(hidden)
    row_tables = (6 * rows + batch) * padded(hidden)
    return groups * row_tables + 5 * padded(groups * padded(rows)) + padded(groups * padded(batch))


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    dtype = problem.dtype
    if dtype in _WIDE:
        return native.forward(_native, problem, keep, threads=torch.get_num_threads())
    wide = native.stored(problem, problem.compute_dtype)
    output, h_n, saved = native.forward(_native, wide, keep, threads=torch.get_num_threads())
    return output.to(dtype), h_n.to(dtype), saved


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    dtype = problem.dtype
    options: dict[str, Any] = {"threads": torch.get_num_threads()}
    if dtype in _WIDE:
        return native.backward(_native, problem, saved, keep, cotangents, need, **options)
    wide = native.stored(problem, problem.compute_dtype)
    grads = native.backward(_native, wide, saved, keep, cotangents, need, **options)
    return Gradients(
        [grad.to(dtype) for grad in grads.inputs],
        [grad.to(dtype) for grad in grads.contexts],
        [x.to_dtypes_of(y) for x, y in zip(grads.weights, problem.weights, strict=False)],
        grads.hx.to(dtype),
    )


def step(step: Step) -> Tensor:
    """The next state `[B, H]`: `forward` of a sequence of one step, with less around it."""
    dtype = step.input.dtype
    if dtype not in _WIDE:
        step = native.stored_step(step, compute_dtype(dtype))
    next_state = step.input.new_empty((step.input.shape[0], step.weights.hidden_size))
    try:
        _step(step, next_state)
    except (TypeError, ValueError):
        _step(native.stored_step(step, step.input.dtype), next_state)
    return next_state if dtype in _WIDE else next_state.to(dtype)


def _step(step: Step, next_state: Tensor) -> None:
    batch, hidden = next_state.shape
    size = _native.step_workspace_size(dtype=next_state.dtype, batch=batch, hidden=hidden)
    _native.step(
        step=step,
        threads=torch.get_num_threads(),
        next_state=next_state,
        workspace=next_state.new_empty(size, dtype=torch.uint8),
    )
