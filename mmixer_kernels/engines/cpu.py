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
    workspace = output.new_empty(_native.forward_workspace_size(problem=call.native))
    _native.forward(problem=call.native, output=output, h_n=h_n, saved=saved, workspace=workspace)
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
    unwanted = dict.fromkeys(Weights._fields)
    gradients = [
        _native.GroupGradient(
            input=grads.inputs[g] if need.input else None,
            context=grads.contexts[g],
            **(grads.weights[g]._asdict() if need.weights else unwanted),
        )
        for g in range(len(problem.inputs))
    ]
    workspace = saved.new_empty(
        _native.backward_workspace_size(problem=call.native, need_weights=need.weights)
    )
    stride_group, stride_step, stride_sample, _ = grad_output.stride()
    _native.backward(
        problem=call.native,
        grad_output=grad_output,
        grad_output_stride_group=stride_group,
        grad_output_stride_step=stride_step,
        grad_output_stride_sample=stride_sample,
        grad_h_n=grad_h_n,
        grad_h_n_stride_group=grad_h_n.stride(0),
        grad_h_n_stride_sample=grad_h_n.stride(1),
        saved=saved,
        gradients=gradients,
        grad_hx=grads.hx,
        workspace=workspace,
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
    batch, hidden = input.shape[0], weights.hidden_size
    rows, context = _rows(input, dtype), _rows(context, dtype)
    if hx is not None:
        hx = _rows(hx, dtype)
    weight_dtype, norm_dtype = dtypes = _stored_dtypes([weights], dtype)
    stored = _stored(weights, dtypes)
    next_state = input.new_empty((batch, hidden), dtype=dtype)
    size = _native.step_workspace_size(dtype=dtype, batch=batch, hidden=hidden)
    _native.step(
        batch=batch,
        hidden=hidden,
        dtype=dtype,
        weight_dtype=weight_dtype,
        norm_dtype=norm_dtype,
        mix=mix,
        eps=eps,
        input=rows,
        input_stride_sample=rows.stride(0),
        input_size=rows.shape[1],
        context=context,
        context_stride_sample=context.stride(0),
        context_size=context.shape[1],
        hx=hx,
        hx_stride_sample=0 if hx is None else hx.stride(0),
        weight_f=stored[0],
        weight_g=stored[1],
        weight_s=stored[2],
        weight_r=stored[3],
        weight_z=stored[4],
        weight_h=stored[5],
        norm_weight=stored[6],
        norm_bias=stored[7],
        threads=torch.get_num_threads(),
        next_state=next_state,
        workspace=input.new_empty(size, dtype=dtype),
    )
    return next_state if dtype is input.dtype else next_state.to(input.dtype)


class _Call:
    """The operands as the extension takes them, and the tensors that keep its addresses valid."""

    def __init__(self, problem: Problem, keep: Keep) -> None:
        inputs, contexts, weights, hx, lengths, mix, eps = problem
        self.sizes = problem.sizes
        _, steps, batch, hidden = self.sizes
        self.dtype = problem.compute_dtype
        self.alive: list[Tensor] = []
        if lengths is not None:
            arguments.check_lengths(lengths, steps, batch, inputs[0])
            lengths = self.keep(lengths.to(torch.int64).contiguous())
        groups = []
        weight_dtype, norm_dtype = dtypes = _stored_dtypes(weights, self.dtype)
        for input, context, group in zip(inputs, contexts, weights, strict=True):
            input, context = self.rows(input), self.rows(context)
            stored = _stored(group, dtypes)
            self.alive += [tensor for tensor in stored if tensor is not None]
            stride_step, stride_sample, _ = input.stride()
            groups.append(
                _native.Group(
                    input=input,
                    input_stride_step=stride_step,
                    input_stride_sample=stride_sample,
                    input_size=input.shape[2],
                    context=context,
                    context_stride_sample=context.stride(0),
                    context_size=context.shape[1],
                    **dict(zip(Weights._fields, stored, strict=True)),
                )
            )
        stride_group = stride_sample = 0
        if hx is not None:
            hx = self.rows(hx)
            stride_group, stride_sample, _ = hx.stride()
        self.native = _native.Problem(
            groups=groups,
            steps=steps,
            batch=batch,
            hidden=hidden,
            mix=mix,
            keep=keep,
            eps=eps,
            threads=torch.get_num_threads(),
            dtype=self.dtype,
            weight_dtype=weight_dtype,
            norm_dtype=norm_dtype,
            hx=hx,
            hx_stride_group=stride_group,
            hx_stride_sample=stride_sample,
            lengths=lengths,
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


def _stored_dtypes(
    weights: Sequence[Weights], dtype: torch.dtype
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which the extension reads the matrices, and the norms: bfloat16 where all of
    them are, which it widens on the way, else the compute dtype."""
    first, bfloat16 = weights[0], torch.bfloat16
    matrices = first.weight_f.dtype is bfloat16
    norms = first.norm_weight is not None and first.norm_weight.dtype is bfloat16
    if matrices:
        matrices = all(x.dtype is bfloat16 for group in weights for x in group.matrices())
    if norms:
        norms = all(x.dtype is bfloat16 for group in weights for x in group.norms())
    return bfloat16 if matrices else dtype, bfloat16 if norms else dtype


def _stored(weights: Weights, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor | None]:
    """The tensors, contiguous, in the dtypes of matrices and norms."""
    stored = []
    for i, tensor in enumerate(weights):
        dtype = dtypes[i >= 6]
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_contiguous()):
            tensor = tensor.to(dtype).contiguous()
        stored.append(tensor)
    return stored
