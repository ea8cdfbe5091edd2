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
from ..reference import Weights, compute_dtype
from .state import EngineState

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
    return _state


def build_info() -> dict[str, Any]:
    """How the extension was built. Raises ImportError when it cannot load."""
    if _state.error is not None:
        raise ImportError(str(_state.error)) from _state.error
    return _native.build_info()


def unsupported(input: Tensor) -> str | None:
    if input.device.type != "cpu":
        return f"it takes CPU tensors, but input is on {input.device}"
    return None


def saved_size(inputs: list[Tensor], hidden_size: int, recompute: bool) -> int:
    """Number of elements that `forward` saves for `backward`: `Saved` of csrc/cpu/buffers.h.

    Computed here too, since under torch.compile the sizes are symbols.
    """
    steps, batch, _ = inputs[0].shape
    lanes = 64 // compute_dtype(inputs[0].dtype).itemsize

    def padded(size: int) -> int:
        return (size + lanes - 1) // lanes * lanes

    rows = steps * batch
    if recompute:
        return len(inputs) * rows * padded(hidden_size)
    row_tables = (6 * rows + batch) * padded(hidden_size)
    return (
        len(inputs) * row_tables
        + 5 * padded(len(inputs) * padded(rows))
        + padded(len(inputs) * padded(batch))
    )


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
    keep = _keep(recompute) if save else "nothing"
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps, keep)
    groups, steps, batch, hidden = call.sizes
    output = inputs[0].new_empty(groups, steps, batch, hidden, dtype=call.dtype)
    h_n = output.new_empty(groups, batch, hidden)
    saved = output.new_empty(saved_size(inputs, hidden, recompute) if save else 0)
    workspace = output.new_empty(_native.forward_workspace_size(problem=call.native))
    _native.forward(problem=call.native, output=output, h_n=h_n, saved=saved, workspace=workspace)
    if call.dtype is not inputs[0].dtype:
        output, h_n = output.to(inputs[0].dtype), h_n.to(inputs[0].dtype)
    return output, h_n, saved


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
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps, _keep(recompute))
    grad_output, grad_h_n = call.rows(grad_output), call.rows(grad_h_n)

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape, dtype=call.dtype)

    grad_inputs = [fresh(tensor) for tensor in inputs] if need_input else []
    grad_contexts = [fresh(tensor) for tensor in contexts]
    grad_weights = [group.map(fresh) for group in weights] if need_weights else []
    grad_hx = fresh(grad_h_n)
    unwanted = dict.fromkeys(Weights._fields)
    gradients = [
        _native.GroupGradient(
            input=grad_inputs[g] if need_input else None,
            context=grad_contexts[g],
            **(grad_weights[g]._asdict() if need_weights else unwanted),
        )
        for g in range(len(inputs))
    ]
    workspace = saved.new_empty(
        _native.backward_workspace_size(problem=call.native, need_weights=need_weights)
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
        grad_hx=grad_hx,
        workspace=workspace,
    )
    dtype = inputs[0].dtype
    return (
        [grad.to(dtype) for grad in grad_inputs],
        [grad.to(dtype) for grad in grad_contexts],
        [grads.like(group) for grads, group in zip(grad_weights, weights, strict=False)],
        grad_hx.to(dtype),
    )


def step(
    input: Tensor, context: Tensor, weights: Weights, hx: Tensor | None, mix: str, eps: float
) -> Tensor:
    """The next state `[B, H]` of one weight set after input `[B, input_size]`: `forward` of a
    sequence of one step, with less around it."""
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

    def __init__(
        self,
        inputs: list[Tensor],
        contexts: list[Tensor],
        weights: list[Weights],
        hx: Tensor | None,
        lengths: Tensor | None,
        mix: str,
        eps: float,
        keep: str,
    ) -> None:
        steps, batch, _ = inputs[0].shape
        self.dtype = compute_dtype(inputs[0].dtype)
        self.sizes = (len(inputs), steps, batch, weights[0].hidden_size)
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
                    weight_f=stored[0],
                    weight_g=stored[1],
                    weight_s=stored[2],
                    weight_r=stored[3],
                    weight_z=stored[4],
                    weight_h=stored[5],
                    norm_weight=stored[6],
                    norm_bias=stored[7],
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
            hidden=self.sizes[3],
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


def _keep(recompute: bool) -> str:
    return "states" if recompute else "gates"
