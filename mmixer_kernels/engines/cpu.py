"""The CPU engine: hand-written C++ (`csrc/cpu`), float32 and float64.

bfloat16 and float16 tensors are computed in float32; bfloat16 weights are read as they are, the
rest is converted first. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..problem import (
    Call,
    Cotangents,
    Gradients,
    Keep,
    Need,
    Problem,
    Step,
    compute_dtype,
)
from . import native
from .protocol import EngineState, Stream

NAME = "cpu"
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
    of_row = 5 if problem.has_context else 4  # gates with a value per row; g has one per sample
    size = groups * (of_row + 1) * rows * padded(hidden) + of_row * padded(groups * padded(rows))
    if problem.has_context:
        size += groups * batch * padded(hidden) + padded(groups * padded(batch))
    return size


def path(problem: Problem, backward: bool) -> str:
    """`protocol.Engine`'s: instruction set, threads, and where the weights are read."""
    groups, steps, batch, hidden = problem.sizes
    work, of_torch = groups * batch * hidden * hidden, torch.get_num_threads()
    count, build = _native.team_size(work, of_torch), _native.build_info()
    parts = [build["instruction_set"], f"{count} thread{'s' * (count > 1)}"]
    if count < of_torch and count == build["processors"]:
        parts[-1] += f" of torch's {of_torch}, one per processor"
    elif count < of_torch:
        parts[-1] += (
            f" of torch's {of_torch}, as a step's product has {work} multiplications and a thread "
            f"takes {_native.multiplications_per_member} at least"
        )
    if steps == 1 and not backward:
        parts.append("weights read where they lie, once each")
    elif steps == 1:  # `are_in_place` of csrc/cpu/backward.h
        parts.append("weights read where they lie, or packed where that is faster")
    else:
        parts.append("weights packed at the call's begin, for all of its steps")
    if problem.dtype not in _WIDE:
        parts.append(f"{problem.dtype} computed in {problem.compute_dtype}".replace("torch.", ""))
    return ", ".join(parts)


def run_forward(call: Call, tensors: Sequence[Tensor]) -> native.Results:
    """`protocol.NativeEngine.run_forward`."""
    return _forward(None, call, tensors)


def prepack(call: Call, tensors: Sequence[Tensor]) -> native.Forward:
    """`protocol.Engine.prepack`."""
    packed: Tensor = _native.pack(call=call, tensors=tensors, threads=torch.get_num_threads())
    return partial(_forward, packed)


def _forward(packed: Tensor | None, call: Call, tensors: Sequence[Tensor]) -> native.Results:
    results: native.Results = _native.forward(
        call=call, tensors=tensors, threads=torch.get_num_threads(), packed=packed
    )
    return results


def run_backward(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Tensor,
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """`protocol.NativeEngine.run_backward`."""
    grads: Sequence[Tensor | None] = _native.backward(
        call=call,
        tensors=tensors,
        saved=saved,
        grad_output=cotangents[0],
        grad_h_n=cotangents[1],
        needs=needs,
        threads=torch.get_num_threads(),
    )
    return grads


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    dtype = problem.dtype
    if dtype in _WIDE:
        return native.forward(run_forward, problem, keep)
    wide = native.stored(problem, problem.compute_dtype)
    output, h_n, saved = native.forward(run_forward, wide, keep)
    return output.to(dtype), h_n.to(dtype), saved


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    dtype = problem.dtype
    if dtype in _WIDE:
        return native.backward(run_backward, problem, saved, keep, cotangents, need)
    wide = native.stored(problem, problem.compute_dtype)
    grads = native.backward(run_backward, wide, saved, keep, cotangents, need)
    return Gradients(
        [grad.to(dtype) for grad in grads.inputs],
        [grad.to(dtype) for grad in grads.contexts],
        [x.to_dtypes_of(y) for x, y in zip(grads.weights, problem.weights, strict=False)],
        grads.hx.to(dtype),
    )


def step(step: Step) -> Tensor:
    """One step without gradients: the next state `[B, H]`."""
    dtype = step.input.dtype
    if dtype in _WIDE:
        return native.step(run_forward, step)
    return native.step(run_forward, native.stored_step(step, compute_dtype(dtype))).to(dtype)


def stream(steps: Sequence[Step]) -> Stream:
    """`protocol.Stream`, in as many threads as torch has now."""
    call, layers = Call(steps[0].form(), "nothing", "step"), [step.tensors() for step in steps]
    opened: Stream = _native.stream(call=call, layers=layers, threads=torch.get_num_threads())
    return opened
