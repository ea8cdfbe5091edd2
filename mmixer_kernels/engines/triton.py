"""The Triton engine: the whole unit without a CUDA toolkit, for any GPU that Triton compiles for.

The products with W_f, W_g, W_s and those of the weights' gradients are torch's; what stands
between them is fused, and the recurrence is one launch, a program for 16 samples of a weight set,
with the weights read from L2 at each step. W_r, W_z and W_h of all weight sets are read where they
lie. A step by itself is one launch, which holds the whole unit. A new batch or length compiles
nothing.

float32 products follow `torch.get_float32_matmul_precision()`: "highest" is IEEE, else TF32.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step, compute_dtype
from . import gpu, triton_tuning
from .gpu import Call, Gates, MixGradient, MixOperands, Prologue, RecurrenceGradient
from .protocol import EngineState

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda",)
saved_size = gpu.saved_size

_BLOCK_B = 16  # samples of a program of the recurrence: the least that a product takes
_BLOCK_M = 64  # rows of a program of the products over all steps


def state(device: torch.device | None = None) -> EngineState:
    """Whether Triton is installed and torch finds a GPU."""
    return _state()


@functools.cache
def _state() -> EngineState:
    if importlib.util.find_spec("triton") is None:
        return EngineState(False, "triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        return EngineState(False, "torch finds no GPU or driver")
    import triton

    return EngineState(True, f"triton {triton.__version__}")


def _kernels() -> ModuleType:
    """Imported late: `import mmixer_kernels` does not bring triton."""
    from . import triton_kernels

    return triton_kernels


def step(step: Step) -> Tensor:
    """One step without gradients in one launch: the next state `[B, H]`."""
    input, context, weights, hx, mix, eps = step
    B, H = input.shape[0], weights.hidden_size
    compute = compute_dtype(input.dtype)
    input, context = gpu.rows(input), gpu.rows(context)
    state = input if hx is None else gpu.rows(hx)
    matrices = [matrix.contiguous() for matrix in weights.matrices()]
    norms = None
    if weights.norm_weight is not None:
        norms = torch.cat([x.to(compute) for x in weights.norms()])
    output = input.new_empty(B, H)
    f_g, state_operand = input.new_empty(B, 2 * H), torch.empty_like(output)
    mixed, a = (input.new_empty(*shape, dtype=compute) for shape in ((B, H), (2, B, H)))
    with gpu.device_of(input):
        _kernels().step[(-(-B // _BLOCK_B),)](
            *(input, input.stride(0), context, context.stride(0), state, state.stride(0)),
            *(*matrices, norms, f_g, state_operand, mixed, a, output),
            *(B, input.shape[1], context.shape[1], H),
            eps=eps,
            HAS_NORM=norms is not None,
            HAS_HX=hx is not None,
            CONCAT=mix == "concat",
            BLOCK_B=_BLOCK_B,
            **_product_options(H, input),
        )
    return output


def _product_options(hidden: int, input: Tensor) -> dict[str, Any]:
    """The options of a kernel with products of operands like `input`."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return {
        **triton_tuning.configuration(hidden, input.dtype, input.device)._asdict(),
        "PRECISION": "tf32" if input.dtype is torch.float32 and not highest else "ieee",
    }


class _Kernels:
    def __init__(self, call: Call, backward: bool) -> None:
        self.call = call
        self.norm_summands = -(-call.B // _BLOCK_B)  # a program of the recurrence writes one
        self.kernels = _kernels()
        sets = call.weights
        self.matrices = tuple(
            x.to(call.dtype) for w in sets for x in (w.weight_r, w.weight_z, w.weight_h)
        )
        self.norms = None
        if call.has_norm:
            norms = [w.norm_weight for w in sets] + [w.norm_bias for w in sets]
            self.norms = torch.stack([x.to(call.compute) for x in norms if x is not None])
        self.options = {
            "HAS_NORM": call.has_norm,
            "BLOCK_H": max(16, 1 << (call.H - 1).bit_length()),
        }
        self.product = {"SETS": call.G, **_product_options(call.H, call.inputs[0])}
        self.recurrent = {
            **self.product,
            "HAS_NORM": call.has_norm,
            "HAS_LENGTHS": call.lengths is not None,
            "BLOCK_B": _BLOCK_B,
        }

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
        da, norm = torch.empty_like(a, dtype=call.dtype), call.norm_sums(rows)
        more = grad_y[1] if len(grad_y) > 1 else None
        self.kernels.norm_tanh_backward[min(rows, gpu.BLOCKS), call.G](
            *(a, grad_y[0], more, self.norms, da, norm, call.G, rows, call.H, gate),
            eps=call.eps,
            HAS_MORE=more is not None,
            **self.options,
        )
        return da, norm

    def _mix_operands(self, operands: MixOperands) -> tuple[Tensor | None, ...]:
        return operands.a, operands.context, self.norms, operands.f_bar, operands.g_bar

    def _mix_options(self) -> dict[str, Any]:
        return {"eps": self.call.eps, "CONCAT": self.call.mix == "concat", **self.options}

    def mix(self, operands: MixOperands) -> Tensor:
        call, rows = self.call, operands.f_bar.shape[1]
        f_tilde = torch.empty_like(operands.f_bar)
        self.kernels.mix[rows, call.G](
            *self._mix_operands(operands),
            *(f_tilde, call.G, rows, call.B, call.H),
            **self._mix_options(),
        )
        return f_tilde

    def mix_backward(self, operands: MixOperands, grad_f_tilde: Tensor, into: MixGradient) -> None:
        call, rows = self.call, operands.f_bar.shape[1]
        self.kernels.mix_backward[min(rows, gpu.BLOCKS), call.G](
            *self._mix_operands(operands),
            *(grad_f_tilde, *into, call.G, rows, call.B, call.H),
            **self._mix_options(),
        )

    def gate_products(self, x: Tensor, first: int, count: int) -> Tensor:
        call, rows = self.call, x.shape[1]
        y = call.empty(call.G, rows, count * call.H)
        columns = self.product["BLOCK_N"]
        self.kernels.products[-(-rows // _BLOCK_M), -(-call.H // columns), call.G * count](
            *(x, self.matrices, y, rows, call.H),
            FIRST=first,
            COUNT=count,
            BLOCK_M=_BLOCK_M,
            **self.product,
        )
        return y

    def recurrence(self, input_gates: Tensor) -> Tensor:
        call = self.call
        states = call.empty(call.G, call.T, call.B, call.H)
        operands = call.empty(2, call.G, call.B, call.H, dtype=call.dtype)
        a = torch.empty_like(operands, dtype=call.compute)
        self.kernels.recurrence[self.norm_summands, call.G](
            *(input_gates, self.matrices, self.norms, call.hx, call.lengths, states, operands, a),
            *(call.T, call.B, call.H),
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
        state_gates = self.gate_products(operand, 0, 2)
        grid, options = (rows, call.G), {"eps": call.eps, **self.options}
        self.kernels.reset_gate[grid](
            *(prologue.input_gates, state_gates, prologue.f_tilde, self.previous, self.norms),
            *(x_hat, r_std, r_h, f_tilde_h, f_tilde_r_h, call.G, rows, call.H),
            **options,
        )
        candidate = self.gate_products(r_h, 2, 1)
        self.kernels.update_gate[grid](
            *(prologue.input_gates, state_gates, candidate, x_hat, r_std, rows, call.H), **options
        )
        return Gates(x_hat, r_std, f_tilde_h, f_tilde_r_h)

    def recurrence_backward(
        self, gates: Gates, states: Tensor, grad_output: Tensor, into: RecurrenceGradient
    ) -> None:
        call = self.call
        self.kernels.recurrence_backward[self.norm_summands, call.G](
            *(gates.x_hat, gates.r_std, self.matrices, self.norms, self.previous, call.lengths),
            *(grad_output, *grad_output.stride()[:3]),
            *(into.hx, into.gates, into.f_tilde, into.norm, call.empty(2, call.G, call.B, call.H)),
            *(call.T, call.B, call.H),
            **self.recurrent,
        )


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    return gpu.forward(_Kernels, problem, keep)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    return gpu.backward(_Kernels, problem, saved, cotangents, need)
