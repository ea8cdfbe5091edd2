"""The Triton engine: the whole unit without a CUDA toolkit, for any GPU that Triton compiles for.

The products outside the recurrence are torch's; what stands between them is fused, and the
recurrence is one launch, a program for 16 samples of a weight set, with the weights read from L2 at
each step. Sizes are arguments at run time but for the hidden size padded to a power of two: a new
batch or length compiles nothing. A size has a fixed configuration, and no autotuning.

float32 products follow `torch.get_float32_matmul_precision()`: "highest" is IEEE, else TF32.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import gpu
from .gpu import Call, Gates, MixGradient, Prologue, RecurrenceGradient, product, saved_size
from .state import EngineState

__all__ = ["backward", "forward", "saved_size", "state", "unsupported"]

_BLOCK_B = 16  # samples of a program: the least that a product takes


@functools.cache
def state() -> EngineState:
    if importlib.util.find_spec("triton") is None:
        return EngineState(False, "triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        return EngineState(False, "torch finds no GPU or driver")
    import triton

    return EngineState(True, f"triton {triton.__version__}")


def unsupported(input: Tensor) -> str | None:
    if input.device.type != "cuda":
        return f"it takes tensors on a GPU, but input is on {input.device}"
    return None


def _kernels() -> ModuleType:
    """Imported late: `import mmixer_kernels` does not bring triton."""
    from . import triton_kernels

    return triton_kernels


def _configuration(hidden: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps of the recurrence: its rows, `[16, BLOCK_H]`, fit into registers."""
    block_h = max(16, 1 << (hidden - 1).bit_length())
    return {
        "BLOCK_B": _BLOCK_B,
        "BLOCK_H": block_h,
        "BLOCK_K": 32 if block_h <= 256 and dtype.itemsize == 2 else 16,
        "num_warps": 8 if block_h <= 128 else 16,
        "num_stages": 2,
    }


class _Kernels:
    removed_mean = False

    def __init__(self, call: Call, backward: bool) -> None:
        self.call = call
        self.kernels = _kernels()
        sets = call.weights
        self.matrices = torch.stack(
            [x.to(call.dtype) for w in sets for x in (w.weight_r, w.weight_z, w.weight_h)]
        ).unflatten(0, (call.G, 3))
        self.norms = None
        if call.has_norm:
            norms = [w.norm_weight for w in sets] + [w.norm_bias for w in sets]
            self.norms = torch.stack([x.to(call.compute) for x in norms if x is not None])
        configuration = _configuration(call.H, call.dtype)
        self.options = {"HAS_NORM": call.has_norm, "BLOCK_H": configuration["BLOCK_H"]}
        highest = torch.get_float32_matmul_precision() == "highest"
        self.recurrent = {
            **self.options,
            **configuration,
            "HAS_LENGTHS": call.lengths is not None,
            "PRECISION": "ieee" if highest or call.is_double else "tf32",
        }

    def _norm_sums(self, rows: int) -> Tensor | None:
        call = self.call
        return call.empty(call.G, min(rows, gpu.BLOCKS), 2, call.H) if call.has_norm else None

    def norm_tanh(self, a: Tensor, gate: int) -> Tensor:
        call, rows = self.call, a.shape[1]
        y = torch.empty_like(a, dtype=call.dtype)
        self.kernels.norm_tanh[rows, call.G](
            *(a, self.norms, y, call.G, rows, call.H, gate), eps=call.eps, **self.options
        )
        return y

    def norm_tanh_backward(
        self, a: Tensor, grad_y: list[Tensor], gate: int
    ) -> tuple[Tensor, Tensor | None]:
        call, rows = self.call, a.shape[1]
        da, norm = torch.empty_like(a, dtype=call.dtype), self._norm_sums(rows)
        more = grad_y[1] if len(grad_y) > 1 else None
        self.kernels.norm_tanh_backward[min(rows, gpu.BLOCKS), call.G](
            *(a, grad_y[0], more, self.norms, da, norm, call.G, rows, call.H, gate),
            eps=call.eps,
            HAS_MORE=more is not None,
            **self.options,
        )
        return da, norm

    def _mix_operands(self, prologue: Prologue) -> tuple[Tensor | None, ...]:
        return (prologue.a_s, prologue.context_s, self.norms, prologue.f_bar, prologue.g_bar)

    def _mix_options(self) -> dict[str, Any]:
        return {"eps": self.call.eps, "CONCAT": self.call.mix == "concat", **self.options}

    def mix(self, prologue: Prologue) -> Tensor:
        call, rows = self.call, prologue.f_bar.shape[1]
        f_tilde = torch.empty_like(prologue.f_bar)
        self.kernels.mix[rows, call.G](
            *self._mix_operands(prologue),
            *(f_tilde, call.G, rows, call.B, call.H),
            **self._mix_options(),
        )
        return f_tilde

    def mix_backward(self, prologue: Prologue, grad_f_tilde: Tensor) -> MixGradient:
        call, rows = self.call, prologue.f_bar.shape[1]
        da, norm = torch.empty_like(prologue.f_bar), self._norm_sums(rows)
        f_bar = g_bar = None
        if call.mix == "gated":
            f_bar, g_bar = (call.empty(call.G, rows, call.H) for _ in range(2))
        self.kernels.mix_backward[min(rows, gpu.BLOCKS), call.G](
            *self._mix_operands(prologue),
            *(grad_f_tilde, da, f_bar, g_bar, norm, call.G, rows, call.B, call.H),
            **self._mix_options(),
        )
        return MixGradient(da, f_bar, g_bar, norm)

    def recurrence(self, input_gates: Tensor) -> Tensor:
        call = self.call
        states = call.empty(call.G, call.T, call.B, call.H)
        operands = call.empty(2, call.G, call.B, call.H, dtype=call.dtype)
        self.kernels.recurrence[-(-call.B // _BLOCK_B), call.G](
            *(input_gates, self.matrices, self.norms, call.hx, call.lengths, states, operands),
            *(call.G, call.T, call.B, call.H),
            eps=call.eps,
            HAS_HX=call.hx is not None,
            **self.recurrent,
        )
        return states

    def gates_again(self, prologue: Prologue, states: Tensor) -> Gates:
        call, rows = self.call, self.call.T * self.call.B
        self.previous = call.previous(states)
        operand = self.previous.to(call.dtype)
        x_hat = call.empty(call.G, 3, call.T, call.B, call.H)
        r_std = call.empty(call.G, 3, call.T, call.B)
        r_h, f_tilde_h, f_tilde_r_h = (torch.empty_like(operand) for _ in range(3))
        state_gates = product(operand, self.matrices[:, :2].flatten(1, 2).mT)
        grid, options = (rows, call.G), {"eps": call.eps, **self.options}
        self.kernels.reset_gate[grid](
            *(prologue.input_gates, state_gates, prologue.f_tilde, self.previous, self.norms),
            *(x_hat, r_std, r_h, f_tilde_h, f_tilde_r_h, call.G, rows, call.H),
            **options,
        )
        candidate = product(r_h, self.matrices[:, 2].mT)
        self.kernels.update_gate[grid](
            *(prologue.input_gates, state_gates, candidate, x_hat, r_std, rows, call.H), **options
        )
        return Gates(x_hat, r_std, f_tilde_h, f_tilde_r_h)

    def recurrence_backward(
        self, gates: Gates, states: Tensor, grad_output: Tensor, grad_h_n: Tensor
    ) -> RecurrenceGradient:
        call, tiles = self.call, -(-self.call.B // _BLOCK_B)
        if grad_output.stride(-1) != 1 and grad_output.shape[-1] > 1:
            grad_output = grad_output.contiguous()
        grad = RecurrenceGradient(
            call.empty(call.G, call.T, call.B, 3, call.H, dtype=call.dtype),
            call.empty(call.G, call.T, call.B, call.H),
            grad_h_n.to(call.compute, copy=True).contiguous(),
            call.empty(call.G, 2, 3, tiles, call.H) if call.has_norm else None,
        )
        self.kernels.recurrence_backward[tiles, call.G](
            *(gates.x_hat, gates.r_std, self.matrices, self.norms, self.previous, call.lengths),
            *(grad_output, *grad_output.stride()[:3]),
            *(grad.hx, grad.gates, grad.f_tilde, grad.norm, call.G, call.T, call.B, call.H),
            **self.recurrent,
        )
        return grad


forward = functools.partial(gpu.forward, _Kernels)
backward = functools.partial(gpu.backward, _Kernels)
