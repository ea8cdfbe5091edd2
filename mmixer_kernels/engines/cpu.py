"""The CPU engine: hand-written C++ (`csrc/cpu`), float32 and float64.

bfloat16 and float16 tensors are computed in float32; bfloat16 weights are read as they are, the
rest is converted first. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step, Weights, compute_dtype
from .protocol import EngineState

NAME = "cpu"
DEVICES: tuple[str, ...] = ("cpu",)

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


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    call = _Call(problem, keep)
    groups, steps, batch, hidden = call.sizes
    output = problem.inputs[0].new_empty(groups, steps, batch, hidden, dtype=call.dtype)
    h_n = output.new_empty(groups, batch, hidden)
    saved = output.new_empty(saved_size(problem, keep))
    workspace = output.new_empty(
        _native.forward_workspace_size(call.is_double, call.native, keep != "nothing")
    )
    _native.forward(
        call.is_double,
        call.native,
        output.data_ptr(),
        h_n.data_ptr(),
        saved.data_ptr(),
        workspace.data_ptr(),
    )
    if call.dtype is not problem.dtype:
        output, h_n = output.to(problem.dtype), h_n.to(problem.dtype)
    return output, h_n, saved


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    call = _Call(problem, keep)
    grad_output, grad_h_n = call.rows(cotangents.output), call.rows(cotangents.h_n)

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape, dtype=call.dtype)

    grads = Gradients(
        [fresh(input) for input in problem.inputs] if need.input else [],
        [fresh(context) for context in problem.contexts],
        [weights.map(fresh) for weights in problem.weights] if need.weights else [],
        fresh(grad_h_n),
    )
    gradients = [
        (
            grads.inputs[g].data_ptr() if need.input else 0,
            grads.contexts[g].data_ptr(),
            *(_addresses(grads.weights[g]) if need.weights else [0] * len(Weights._fields)),
        )
        for g in range(len(problem.inputs))
    ]
    workspace = saved.new_empty(
        _native.backward_workspace_size(call.is_double, call.native, need.weights)
    )
    _native.backward(
        call.is_double,
        call.native,
        (grad_output.data_ptr(), *grad_output.stride()[:3]),
        (grad_h_n.data_ptr(), *grad_h_n.stride()[:2]),
        saved.data_ptr(),
        gradients,
        grads.hx.data_ptr(),
        workspace.data_ptr(),
    )
    dtype = problem.dtype
    return Gradients(
        [grad.to(dtype) for grad in grads.inputs],
        [grad.to(dtype) for grad in grads.contexts],
        [x.to_dtypes_of(y) for x, y in zip(grads.weights, problem.weights, strict=False)],
        grads.hx.to(dtype),
    )


def step(step: Step) -> Tensor:
    """The next state `[B, H]`: `forward` of a sequence of one step, with less around it."""
    input, context, weights, hx, mix, eps = step
    dtype = compute_dtype(input.dtype)
    alive = [_rows(input, dtype), _rows(context, dtype)]
    batch, input_size = input.shape
    state = (0, 0)
    if hx is not None:
        alive.append(_rows(hx, dtype))
        state = (alive[2].data_ptr(), alive[2].stride(0))
    bfloat16 = _in_bfloat16([weights])
    addresses, copies = _stored(weights, dtype, bfloat16)
    is_double = dtype is torch.float64
    sizes = (batch, input_size, context.shape[1], weights.hidden_size)
    next_state = input.new_empty((batch, sizes[3]), dtype=dtype)
    workspace = input.new_empty(_native.step_workspace_size(is_double, *sizes), dtype=dtype)
    _native.step(
        is_double,
        *sizes,
        mix == "concat",
        bfloat16,
        eps,
        torch.get_num_threads(),
        (alive[0].data_ptr(), alive[0].stride(0)),
        (alive[1].data_ptr(), alive[1].stride(0)),
        addresses,
        state,
        next_state.data_ptr(),
        workspace.data_ptr(),
    )
    del alive, copies  # their addresses were in use until here
    return next_state if dtype is input.dtype else next_state.to(input.dtype)


class _Call:
    """The operands as the extension takes them, and the tensors that keep its addresses valid."""

    def __init__(self, problem: Problem, keep: Keep) -> None:
        inputs, contexts, weights, hx, lengths, mix, eps = problem
        self.sizes = problem.sizes
        _, steps, batch, _ = self.sizes
        self.dtype = problem.compute_dtype
        self.is_double = self.dtype == torch.float64
        self.alive: list[Tensor] = []
        if lengths is not None:
            arguments.check_lengths(lengths, steps, batch, inputs[0])
            lengths = self.keep(lengths.to(torch.int64).contiguous())
        groups = []
        bfloat16 = _in_bfloat16(weights)
        for input, context, group in zip(inputs, contexts, weights, strict=True):
            input, context = self.rows(input), self.rows(context)
            addresses, copies = _stored(group, self.dtype, bfloat16)
            self.alive += copies
            groups.append(
                (
                    input.data_ptr(),
                    *input.stride()[:2],
                    input.shape[2],
                    context.data_ptr(),
                    context.stride(0),
                    context.shape[1],
                    *addresses,
                )
            )
        state: tuple[int, ...] = (0, 0, 0)
        if hx is not None:
            hx = self.rows(hx)
            state = (hx.data_ptr(), *hx.stride()[:2])
        self.native = _native.Call(
            self.sizes,
            mix == "concat",
            bfloat16,
            keep == "states",
            eps,
            torch.get_num_threads(),
            groups,
            state,
            0 if lengths is None else lengths.data_ptr(),
        )

    def keep(self, tensor: Tensor) -> Tensor:
        self.alive.append(tensor)
        return tensor

    def rows(self, tensor: Tensor) -> Tensor:
        return self.keep(_rows(tensor, self.dtype))


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the compute dtype with contiguous rows; a copy only where it has not."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor


def _in_bfloat16(weights: Sequence[Weights]) -> tuple[bool, bool]:
    """Whether all matrices, and all norms, can be read as they are, widened on the way."""
    first, bfloat16 = weights[0], torch.bfloat16
    matrices = first.weight_f.dtype is bfloat16
    norms = first.norm_weight is None or first.norm_weight.dtype is bfloat16
    if matrices:
        matrices = all(x.dtype is bfloat16 for group in weights for x in group.matrices())
    if norms:
        norms = all(x.dtype is bfloat16 for group in weights for x in group.norms())
    return matrices, norms


def _stored(
    weights: Weights, dtype: torch.dtype, bfloat16: tuple[bool, bool]
) -> tuple[list[int], list[Tensor]]:
    """Addresses of the tensors, contiguous, in bfloat16 or else in the compute dtype; and the
    copies that had to be made."""
    addresses, copies = [], []
    matrices = torch.bfloat16 if bfloat16[0] else dtype
    norms = torch.bfloat16 if bfloat16[1] else dtype
    for i, tensor in enumerate(weights):
        stored = matrices if i < 6 else norms
        if tensor is None:
            addresses.append(0)
            continue
        if tensor.dtype is not stored or not tensor.is_contiguous():
            tensor = tensor.to(stored).contiguous()
            copies.append(tensor)
        addresses.append(tensor.data_ptr())
    return addresses, copies


def _addresses(weights: Weights) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in weights]
