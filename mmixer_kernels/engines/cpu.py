"""The CPU engine: hand-written C++ (`csrc/cpu`), float32 and float64.

bfloat16 and float16 tensors are computed in float32. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

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


def state() -> EngineState:
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


def saved_size(
    inputs: list[Tensor], contexts: list[Tensor], hidden_size: int, layer_norm: bool
) -> int:
    """Number of elements that `forward` saves for `backward`: `Saved` of csrc/cpu/buffers.h.

    Computed here too, since under torch.compile the sizes are symbols.
    """
    steps, batch, _ = inputs[0].shape
    lanes = 64 // compute_dtype(inputs[0].dtype).itemsize

    def padded(size: int) -> int:
        return (size + lanes - 1) // lanes * lanes

    rows = steps * batch
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
) -> tuple[Tensor, Tensor, Tensor]:
    """G weight sets over a sequence: output `[G, T, B, H]`, h_n `[G, B, H]`, saved."""
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps)
    groups, steps, batch, hidden = call.sizes
    output = inputs[0].new_empty(groups, steps, batch, hidden, dtype=call.dtype)
    h_n = output.new_empty(groups, batch, hidden)
    size = saved_size(inputs, contexts, hidden, weights[0].norm_weight is not None) if save else 0
    saved = output.new_empty(size)
    workspace = output.new_empty(_native.forward_workspace_size(call.is_double, call.native, save))
    _native.forward(
        call.is_double,
        call.native,
        output.data_ptr(),
        h_n.data_ptr(),
        saved.data_ptr() if save else 0,
        workspace.data_ptr(),
    )
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
    need_input: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Weights], Tensor]:
    """Gradients of inputs (empty unless needed), contexts, weights (likewise), hx `[G, B, H]`."""
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps)
    grad_output, grad_h_n = call.rows(grad_output), call.rows(grad_h_n)

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape, dtype=call.dtype)

    grad_inputs = [fresh(tensor) for tensor in inputs] if need_input else []
    grad_contexts = [fresh(tensor) for tensor in contexts]
    grad_weights = [group.map(fresh) for group in weights] if need_weights else []
    grad_hx = fresh(grad_h_n)
    gradients = [
        (
            grad_inputs[g].data_ptr() if need_input else 0,
            grad_contexts[g].data_ptr(),
            *(_addresses(grad_weights[g]) if need_weights else [0] * len(Weights._fields)),
        )
        for g in range(len(inputs))
    ]
    workspace = saved.new_empty(
        _native.backward_workspace_size(call.is_double, call.native, need_weights)
    )
    _native.backward(
        call.is_double,
        call.native,
        (grad_output.data_ptr(), *grad_output.stride()[:3]),
        (grad_h_n.data_ptr(), *grad_h_n.stride()[:2]),
        saved.data_ptr(),
        gradients,
        grad_hx.data_ptr(),
        workspace.data_ptr(),
    )
    dtype = inputs[0].dtype
    return (
        [grad.to(dtype) for grad in grad_inputs],
        [grad.to(dtype) for grad in grad_contexts],
        [group.map(lambda grad: grad.to(dtype)) for group in grad_weights],
        grad_hx.to(dtype),
    )


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
    ) -> None:
        steps, batch, _ = inputs[0].shape
        self.dtype = compute_dtype(inputs[0].dtype)
        self.is_double = self.dtype == torch.float64
        self.sizes = (len(inputs), steps, batch, weights[0].hidden_size)
        self.alive: list[Tensor] = []
        if lengths is not None:
            arguments.check_lengths(lengths, steps, batch, inputs[0])
            lengths = self.keep(lengths.to(torch.int64).contiguous())
        groups = []
        for input, context, group in zip(inputs, contexts, weights, strict=True):
            input, context = self.rows(input), self.rows(context)
            groups.append(
                (
                    input.data_ptr(),
                    *input.stride()[:2],
                    input.shape[2],
                    context.data_ptr(),
                    context.stride(0),
                    context.shape[1],
                    *_addresses(group.map(self.packed)),
                )
            )
        state: tuple[int, ...] = (0, 0, 0)
        if hx is not None:
            hx = self.rows(hx)
            state = (hx.data_ptr(), *hx.stride()[:2])
        self.native = _native.Call(
            self.sizes,
            mix == "concat",
            False,
            False,
            eps,
            torch.get_num_threads(),
            groups,
            state,
            0 if lengths is None else lengths.data_ptr(),
        )

    def keep(self, tensor: Tensor) -> Tensor:
        self.alive.append(tensor)
        return tensor

    def packed(self, tensor: Tensor) -> Tensor:
        """The tensor contiguous and in the compute dtype; a copy only where it is not."""
        if tensor.dtype is self.dtype and tensor.is_contiguous():
            return tensor
        return self.keep(tensor.to(self.dtype).contiguous())

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor in the compute dtype with contiguous rows; a copy only where it has not."""
        if tensor.dtype is not self.dtype:
            tensor = tensor.to(self.dtype)
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        return self.keep(tensor)


def _addresses(weights: Weights) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in weights]
