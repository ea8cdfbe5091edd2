"""The CUDA engine (`csrc/cuda`): a whole sequence of the recurrence in one launch.

The products outside the recurrence are cuBLAS's, through torch; what stands between them is fused.
Recurrent weights stay on the chip for the sequence, on one of two paths: "cluster" (thread block
clusters, compute capability 9.0 and newer) or "cooperative" (exchange through L2, 8.0 and newer).
Sizes and dtypes that neither takes go step by step, each step two products and two kernels: path
"step". The logger `mmixer_kernels.engines.cuda` tells, at level DEBUG, which path a call took.

Backward keeps the states alone and computes the gates again, as products over all steps.

float32 follows `torch.get_float32_matmul_precision()`: "highest" has float32's error in the
recurrence, "high" and "medium" 2^-16 a product. bfloat16 products have bfloat16 operands, float16
ones in the recurrence 16 bits; statistics, gates and states are float32. float64 takes path "step".
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..reference import Weights, compute_dtype
from .state import EngineState

_native: Any = None
_import_error: ImportError | None = None
try:
    from .. import _native as _extension  # type: ignore[attr-defined]
except ImportError as error:
    _import_error = error
else:
    _native = getattr(_extension, "cuda", None)

PATHS = ("cluster", "cooperative", "step")
"""In the order in which they are tried."""

_SAMPLES = 8  # of a team: the width of a tensor core's product
_MOST_ROUNDS = 8  # of persistent kernels one after another; beyond, a step's products fill the GPU
_BLOCKS = 256  # of a row-wise kernel that sums over rows, a weight set
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FIRST_CAPABILITY = (8, 0)

_logger = logging.getLogger(__name__)


def state() -> EngineState:
    if _import_error is not None:
        reason = f"the extension mmixer_kernels._native cannot load: {_import_error}"
        return EngineState(False, reason, _import_error)
    if _native is None:
        return EngineState(
            False, "this build has no CUDA: install again where nvcc is on the path (or CUDACXX)"
        )
    return _device_state()


@functools.cache
def _device_state() -> EngineState:
    if torch.version.cuda is None:
        return EngineState(False, "this torch has no CUDA: install one that has")
    if not torch.cuda.is_available():
        return EngineState(False, "torch finds no CUDA device or driver")
    capabilities = {
        index: torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
    }
    if max(capabilities.values()) < _FIRST_CAPABILITY:
        return EngineState(
            False, f"it needs compute capability 8.0 or newer, but here are {capabilities}"
        )
    return EngineState(True, f"CUDA, {_extension.build_info()['cuda']}")


def unsupported(input: Tensor) -> str | None:
    if input.device.type != "cuda":
        return f"it takes CUDA tensors, but input is on {input.device}"
    capability = torch.cuda.get_device_capability(input.device)
    if capability < _FIRST_CAPABILITY:
        return (
            f"it needs compute capability 8.0 or newer, but {input.device} has "
            f"{capability[0]}.{capability[1]}"
        )
    return None


def saved_size(inputs: list[Tensor], hidden_size: int, recompute: bool) -> int:
    """Number of elements that `forward` saves for `backward`: the states."""
    steps, batch, _ = inputs[0].shape
    return len(inputs) * steps * batch * hidden_size


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
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps)
    with call.device:
        plan = _plan(call, backward=False)
        prepared = _prepare(call, plan, transposed=False)
        prologue = _Prologue(call, prepared)
        if plan.path == "step":
            states = _step_forward(call, prepared, prologue.input_gates)
        else:
            states = _persistent_forward(call, plan, prepared, prologue.input_gates)
        output = states.to(call.dtype, copy=save or lengths is not None)
        if lengths is not None:
            output.masked_fill_(~call.valid()[..., None], 0)
        h_n = states[:, -1].to(call.dtype, copy=True)
    return output, h_n, states.view(-1) if save else states.new_empty(0)


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
    call = _Call(inputs, contexts, weights, hx, lengths, mix, eps)
    with call.device:
        plan = _plan(call, backward=True)
        prepared = _prepare(call, plan, transposed=True)
        prologue = _Prologue(call, prepared)
        states = saved.view(call.G, call.T, call.B, call.H)
        gates = _gates_again(call, prepared, prologue, states)
        run = _step_backward if plan.path == "step" else _persistent_backward
        grad = run(call, plan, prepared, gates, states, grad_output, grad_h_n)
        rest = _prologue_backward(call, prepared, prologue, grad.f_tilde, need_input, need_weights)
        grad_weights = []
        if need_weights:
            grad_weights = [
                _weight_gradients(call, plan, g, gates, grad, rest).like(weights[g])
                for g in range(call.G)
            ]
    return (
        [x.view_as(input).to(call.dtype) for x, input in zip(rest.inputs, inputs, strict=False)],
        [x.to(call.dtype) for x in rest.contexts],
        grad_weights,
        grad.hx.to(call.dtype),
    )


class _Plan(NamedTuple):
    path: str
    parts: int  # bfloat16 terms of a float in the recurrence's products
    padded: int  # hidden size
    teams: int  # at once
    packets: int  # bytes a team


class _Call:
    """The operands, in the order and the dtypes in which the kernels take them."""

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
        if len(inputs) > _native.most_weight_sets:
            raise ValueError(
                f"a call takes at most {_native.most_weight_sets} weight sets, but has "
                f"{len(inputs)}: make several calls"
            )
        self.T, self.B, _ = inputs[0].shape
        self.G, self.H = len(inputs), weights[0].hidden_size
        self.dtype = inputs[0].dtype
        self.compute = compute_dtype(self.dtype)
        self.is_double = self.compute is torch.float64
        self.mix, self.eps = mix, eps
        self.device: AbstractContextManager[Any] = nullcontext()
        self.index, self.stream = -1, 0
        if inputs[0].is_cuda:
            self.index = inputs[0].device.index
            self.device = torch.cuda.device(self.index)
            self.stream = torch.cuda.current_stream(self.index).cuda_stream
        self.lengths = None
        if lengths is not None:
            arguments.check_lengths(lengths, self.T, self.B, inputs[0])
            self.lengths = lengths.to(torch.int64).contiguous()
            inputs = [torch.where(self.valid()[..., None], x, 0) for x in inputs]
        self.inputs = [x.reshape(self.T * self.B, -1) for x in inputs]
        self.contexts = contexts
        self.weights = [group.map(torch.Tensor.contiguous) for group in weights]
        self.hx = None if hx is None else hx.to(self.compute).contiguous()
        self.has_norm = weights[0].norm_weight is not None

    def valid(self) -> Tensor:
        """`[T, B]`: whether a step is inside its sample's length."""
        assert self.lengths is not None
        return torch.arange(self.T, device=self.lengths.device)[:, None] < self.lengths

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.compute, device=self.inputs[0].device)

    def operands(self, tensors: list[Tensor]) -> list[Tensor]:
        """In the dtype of a product's operands."""
        return [x.to(self.dtype) for x in tensors]

    def run(self, name: str, arguments: Any) -> None:
        getattr(_native, name)(arguments, self.is_double, self.stream)


def _fill(target: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif isinstance(value, torch.dtype):
            value = _DTYPES[value]
        setattr(target, name, 0 if value is None else value)
    return target


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of `[..., n, k]` and `[..., k, m]`, summed and returned in the compute dtype."""
    dtype = compute_dtype(a.dtype)
    if a.dtype is dtype:
        return a @ b
    if not a.is_cuda:  # the emulator's tests
        return a.to(dtype) @ b.to(dtype)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)


def _each(xs: Any, matrices: Any) -> Tensor:
    """`[G, rows, H]`: each weight set's rows times its matrix; the sizes summed over may differ."""
    products = [_product(x, matrix) for x, matrix in zip(xs, matrices, strict=True)]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def _parts(dtype: torch.dtype) -> int | None:
    """bfloat16 terms a float is split into; None: the persistent kernels do not take the dtype."""
    if dtype is torch.float64:
        return None
    if dtype is torch.bfloat16:
        return 1
    if dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return 3
    return 2


@functools.cache
def _native_plan(
    device: int, path: str, hidden: int, parts: int, backward: bool
) -> tuple[int, int, int]:
    padded, teams, packets = _native.plan(path == "cluster", hidden, parts, backward)
    return padded, teams, packets


def _plan(call: _Call, backward: bool) -> _Plan:
    parts = _parts(call.dtype)
    teams = call.G * -(-call.B // _SAMPLES)
    chosen, refused = None, []
    for path in PATHS:
        if path == "step":
            chosen = _Plan("step", parts or 0, call.H, 0, 0)
        elif parts is None:
            refused.append(f"{path}: no kernel for {call.dtype}")
        else:
            plan = _Plan(path, parts, *_native_plan(call.index, path, call.H, parts, backward))
            if plan.padded == 0:
                refused.append(f"{path}: no kernel for H = {call.H} here")
            elif teams > _MOST_ROUNDS * plan.teams:
                refused.append(f"{path}: {teams} teams, {plan.teams} at once")
            else:
                chosen = plan
        if chosen is not None:
            break
    if chosen is None:
        raise RuntimeError(f"no path takes this call: {'; '.join(refused)}")
    _logger.debug(
        "%s of G=%d T=%d B=%d H=%d %s: path %s, H padded to %d, %d terms a float%s",
        "backward" if backward else "forward",
        *(call.G, call.T, call.B, call.H, call.dtype, chosen.path, chosen.padded, chosen.parts),
        f" ({'; '.join(refused)})" if refused else "",
    )
    return chosen


class _Prepared(NamedTuple):
    matrices: Tensor  # W_r, W_z, W_h `[G, 3, H, H]`, as a product's operand
    terms: Tensor | None  # the same for a persistent kernel
    norms: Tensor | None  # `[2, G, 6, H]`

    def state_gates(self) -> Tensor:
        """`[G, 2H, H]`: W_r above W_z."""
        return self.matrices[:, :2].flatten(1, 2)


def _prepare(call: _Call, plan: _Plan, transposed: bool) -> _Prepared:
    persistent = plan.path != "step"
    matrices = call.empty(call.G, 3, call.H, call.H, dtype=call.dtype)
    terms = norms = None
    if persistent:
        shape = call.G, plan.parts, 3, plan.padded, plan.padded
        terms = call.empty(*shape, dtype=torch.bfloat16)
    if call.has_norm:
        norms = call.empty(2, call.G, 6, call.H)
    weights = call.weights[0]
    native = _fill(
        _native.PrepareArguments(),
        weight_dtype=weights.weight_r.dtype,
        norm_dtype=weights.norm_weight.dtype if weights.norm_weight is not None else call.compute,
        remove_mean=persistent and call.has_norm,
        transposed=transposed,
        **{"matrices": matrices, "matrices_dtype": call.dtype, "terms": terms, "norms": norms},
        **{"G": call.G, "H": call.H, "Hp": plan.padded, "parts": plan.parts},
    )
    for g, group in enumerate(call.weights):
        tensors = group.weight_r, group.weight_z, group.weight_h, group.norm_weight, group.norm_bias
        native.set_weights(g, *(0 if x is None else x.data_ptr() for x in tensors))
    _native.prepare(native, call.stream)
    return _Prepared(matrices, terms, norms)


class _Prologue:
    """Equations 7-10, and the share of f_tilde in the recurrent gates."""

    def __init__(self, call: _Call, prepared: _Prepared) -> None:
        rows = call.T * call.B
        hidden = call.H
        self.weights_f = call.operands([group.weight_f for group in call.weights])
        self.weights_g = call.operands([group.weight_g for group in call.weights])
        weights_s = call.operands([group.weight_s for group in call.weights])
        self.weights_sf = [w[:, :hidden] for w in weights_s]
        self.weights_sg = [w[:, hidden:] for w in weights_s]
        self.a_f = _each(call.inputs, [w.T for w in self.weights_f])
        self.a_g = _each(call.contexts, [w.T for w in self.weights_g])
        self.f_bar = _norm_tanh(call, prepared, self.a_f, gate=0)
        self.g_bar = _norm_tanh(call, prepared, self.a_g, gate=1)
        self.a_s = _each(self.f_bar, [w.T for w in self.weights_sf])
        self.context_s = _each(self.g_bar, [w.T for w in self.weights_sg])
        self.f_tilde = call.empty(call.G, rows, hidden, dtype=call.dtype)
        native = self.mix_arguments(call, prepared, rows)
        call.run("mix", _fill(native, f_tilde=self.f_tilde))
        matrices = prepared.matrices.flatten(1, 2)
        self.input_gates = _product(self.f_tilde, matrices.mT)

    def mix_arguments(self, call: _Call, prepared: _Prepared, blocks: int) -> Any:
        return _fill(
            _native.MixArguments(),
            **_rows(call, call.T * call.B, blocks),
            norms=prepared.norms,
            eps=call.eps,
            samples=call.B,
            a=self.a_s,
            context=self.context_s,
            f_bar=self.f_bar,
            g_bar=self.g_bar,
            dtype=call.dtype,
            concat=call.mix == "concat",
        )


def _rows(call: _Call, rows: int, blocks: int) -> dict[str, int]:
    return {"G": call.G, "rows": rows, "H": call.H, "blocks": min(rows, blocks)}


def _norm_tanh(call: _Call, prepared: _Prepared, a: Tensor, gate: int) -> Tensor:
    y = torch.empty_like(a, dtype=call.dtype)
    native = _fill(
        _native.NormTanhArguments(),
        **_rows(call, a.shape[1], a.shape[1]),
        **{"a": a, "norms": prepared.norms, "y": y, "y_dtype": call.dtype},
        **{"gate": gate, "eps": call.eps},
    )
    call.run("norm_tanh", native)
    return y


def _persistent_forward(
    call: _Call, plan: _Plan, prepared: _Prepared, input_gates: Tensor
) -> Tensor:
    states = call.empty(call.G, call.T, call.B, call.H)
    packets = _packets(call, plan)
    native = _fill(
        _native.ForwardArguments(),
        weights=prepared.terms,
        input_gates=input_gates,
        norms=prepared.norms,
        hx=call.hx,
        lengths=call.lengths,
        states=states,
        packets=packets,
        eps=call.eps,
        **{"G": call.G, "T": call.T, "B": call.B, "H": call.H},
    )
    _native.forward(plan.path == "cluster", plan.parts, plan.teams, native, call.stream)
    return states


def _packets(call: _Call, plan: _Plan) -> Tensor:
    teams = min(plan.teams, call.G * -(-call.B // _SAMPLES))
    return call.empty(teams * plan.packets, dtype=torch.uint8)


def _gate_arguments(call: _Call, prepared: _Prepared, states: Tensor) -> Any:
    return _fill(
        _native.GateArguments(),
        **{"G": call.G, "T": call.T, "B": call.B, "H": call.H, "steps": 1},
        **{"norms": prepared.norms, "states": states, "hx": call.hx, "lengths": call.lengths},
        **{"dtype": call.dtype, "eps": call.eps},
    )


def _step_forward(call: _Call, prepared: _Prepared, input_gates: Tensor) -> Tensor:
    states = call.empty(call.G, call.T, call.B, call.H)
    operand = call.empty(call.G, call.B, call.H, dtype=call.dtype)
    operand.copy_(call.hx) if call.hx is not None else operand.zero_()
    r_h = torch.empty_like(operand)
    native = _fill(
        _gate_arguments(call, prepared, states), input_gates=input_gates, operand=operand, r_h=r_h
    )
    state_gates, weight_h = prepared.state_gates().mT, prepared.matrices[:, 2].mT
    for t in range(call.T):
        products = _product(operand, state_gates)
        call.run("reset_gate", _fill(native, first_step=t, state_gates=products))
        candidate = _product(r_h, weight_h)
        call.run("update_gate", _fill(native, candidate=candidate))
    return states


class _Gates(NamedTuple):
    """What the recurrence's gradient needs of each step."""

    x_hat: Tensor  # `[G, 3, T, B, H]`, the compute dtype
    x_hat_operand: Tensor  # the same in the dtype of operands
    r_std: Tensor  # `[G, 3, T, B]`
    f_tilde_h: Tensor  # `[G, T B, H]`: what W_r and W_z are multiplied with
    f_tilde_r_h: Tensor  # likewise W_h


def _gates_again(call: _Call, prepared: _Prepared, prologue: _Prologue, states: Tensor) -> _Gates:
    x_hat = call.empty(call.G, 3, call.T, call.B, call.H)
    narrow = call.dtype is not call.compute
    x_hat_operand = torch.empty_like(x_hat, dtype=call.dtype) if narrow else x_hat
    r_std = call.empty(call.G, 3, call.T, call.B)
    first = states.new_zeros(call.G, 1, call.B, call.H) if call.hx is None else call.hx[:, None]
    operand = torch.cat([first, states[:, :-1]], dim=1).to(call.dtype).flatten(1, 2)
    r_h, f_tilde_h, f_tilde_r_h = (torch.empty_like(operand) for _ in range(3))
    products = _product(operand, prepared.state_gates().mT)
    native = _fill(
        _gate_arguments(call, prepared, states),
        steps=call.T,
        input_gates=prologue.input_gates,
        state_gates=products,
        f_tilde=prologue.f_tilde,
        r_h=r_h,
        x_hat=x_hat,
        x_hat_operand=x_hat_operand if narrow else None,
        r_std=r_std,
        f_tilde_h=f_tilde_h,
        f_tilde_r_h=f_tilde_r_h,
    )
    call.run("reset_gate", native)
    candidate = _product(r_h, prepared.matrices[:, 2].mT)
    call.run("update_gate", _fill(native, candidate=candidate))
    return _Gates(x_hat, x_hat_operand, r_std, f_tilde_h, f_tilde_r_h)


class _RecurrenceGradient(NamedTuple):
    gates: Tensor  # of the pre-activations r z h: `[G, T, B, 3, H]`, a product's operand
    f_tilde: Tensor  # `[G, T, B, H]`
    hx: Tensor  # `[G, B, H]`
    norm: Tensor | None  # `[G, 2, 3, B, H]`: of norm_weight and norm_bias, a sum a sample


def _fresh_gradient(call: _Call, hx: Tensor) -> _RecurrenceGradient:
    return _RecurrenceGradient(
        call.empty(call.G, call.T, call.B, 3, call.H, dtype=call.dtype),
        call.empty(call.G, call.T, call.B, call.H),
        hx,
        call.empty(call.G, 2, 3, call.B, call.H) if call.has_norm else None,
    )


def _grad_output(tensor: Tensor) -> dict[str, Any]:
    """It is read where it lies unless its rows do not."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return {
        "grad_output": tensor,
        "grad_output_dtype": tensor.dtype,
        "grad_output_stride": tensor.stride()[:3],
    }


def _persistent_backward(
    call: _Call,
    plan: _Plan,
    prepared: _Prepared,
    gates: _Gates,
    states: Tensor,
    grad_output: Tensor,
    grad_h_n: Tensor,
) -> _RecurrenceGradient:
    projected = None
    if call.has_norm:
        x_hat = gates.x_hat_operand.view(call.G * 3, call.T * call.B, call.H)
        projected = _product(x_hat, prepared.matrices.flatten(0, 1))
    grad = _fresh_gradient(call, call.empty(call.G, call.B, call.H))
    packets, grad_h_n = _packets(call, plan), grad_h_n.to(call.compute).contiguous()
    output = _grad_output(grad_output)
    native = _fill(
        _native.BackwardArguments(),
        weights=prepared.terms,
        x_hat=gates.x_hat,
        projected=projected,
        r_std=gates.r_std,
        norms=prepared.norms,
        states=states,
        hx=call.hx,
        lengths=call.lengths,
        **output,
        grad_h_n=grad_h_n,
        grad_gates=grad.gates,
        grad_gates_dtype=call.dtype,
        grad_f_tilde=grad.f_tilde,
        grad_hx=grad.hx,
        grad_norm=grad.norm,
        packets=packets,
        **{"G": call.G, "T": call.T, "B": call.B, "H": call.H},
    )
    _native.backward(plan.path == "cluster", plan.parts, plan.teams, native, call.stream)
    return grad


def _step_backward(
    call: _Call,
    plan: _Plan,
    prepared: _Prepared,
    gates: _Gates,
    states: Tensor,
    grad_output: Tensor,
    grad_h_n: Tensor,
) -> _RecurrenceGradient:
    grad = _fresh_gradient(call, grad_h_n.to(call.compute, copy=True).contiguous())
    carry, output = torch.empty_like(grad.hx), _grad_output(grad_output)
    native = _fill(
        _native.GateBackwardArguments(),
        **{"G": call.G, "T": call.T, "B": call.B, "H": call.H},
        x_hat=gates.x_hat,
        r_std=gates.r_std,
        norms=prepared.norms,
        states=states,
        hx=call.hx,
        lengths=call.lengths,
        **output,
        dtype=call.dtype,
        carry=carry,
        grad_h=grad.hx,
        grad_gates=grad.gates,
        grad_f_tilde=grad.f_tilde,
        grad_norm=grad.norm,
    )
    state_gates, weight_h = prepared.state_gates(), prepared.matrices[:, 2]
    for t in reversed(range(call.T)):
        call.run("update_gate_backward", _fill(native, step=t))
        grad_r_h = _product(grad.gates[:, t, :, 2], weight_h)
        call.run("reset_gate_backward", _fill(native, grad_r_h=grad_r_h))
        grad_sum = _product(grad.gates[:, t, :, :2].flatten(2), state_gates)
        _fill(native, grad_sum=grad_sum)
    call.run("update_gate_backward", _fill(native, step=-1))
    return grad


class _PrologueGradient(NamedTuple):
    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[tuple[Tensor, Tensor, Tensor]]  # W_f, W_g, W_s
    norms: list[Tensor]  # f g s: `[G, 2, H]`


def _prologue_backward(
    call: _Call,
    prepared: _Prepared,
    prologue: _Prologue,
    grad_f_tilde: Tensor,
    need_input: bool,
    need_weights: bool,
) -> _PrologueGradient:
    rows, gated = call.T * call.B, call.mix == "gated"
    grad_f_bar = grad_g_bar = norm_s = None
    if gated:
        grad_f_bar = call.empty(call.G, rows, call.H)
        grad_g_bar = torch.empty_like(grad_f_bar)
    if call.has_norm:
        norm_s = call.empty(call.G, min(rows, _BLOCKS), 2, call.H)
    da_s = call.empty(call.G, rows, call.H, dtype=call.dtype)
    native = _fill(
        prologue.mix_arguments(call, prepared, _BLOCKS),
        grad_f_tilde=grad_f_tilde,
        grad_a=da_s,
        grad_f_bar=grad_f_bar,
        grad_g_bar=grad_g_bar,
        grad_norm=norm_s,
    )
    call.run("mix_backward", native)

    through_s = _each(da_s, prologue.weights_sf)
    da_f, norm_f = _norm_tanh_backward(
        call, prepared, prologue.a_f, [x for x in (grad_f_bar, through_s) if x is not None], gate=0
    )
    da_s_context = da_s.view(call.G, call.T, call.B, call.H).sum(1, dtype=call.compute)
    context_weights = [w.to(call.compute) for w in prologue.weights_sg]
    to_context = [_each(da_s_context, context_weights)]
    if grad_g_bar is not None:
        to_context.append(grad_g_bar.view(call.G, call.T, call.B, call.H).sum(1))
    da_g, norm_g = _norm_tanh_backward(call, prepared, prologue.a_g, to_context, gate=1)

    products = []
    if need_weights:
        g_bar = prologue.g_bar.to(call.compute)
        for g in range(call.G):
            halves = (
                _product(da_s[g].T, prologue.f_bar[g]),
                _product(da_s_context[g].T, g_bar[g]),
            )
            weight_f = _product(da_f[g].T, call.inputs[g])
            weight_g = _product(da_g[g].T, call.contexts[g])
            products.append((weight_f, weight_g, torch.cat(halves, dim=1)))
    return _PrologueGradient(
        [_product(da_f[g], w) for g, w in enumerate(prologue.weights_f)] if need_input else [],
        [_product(da_g[g], w) for g, w in enumerate(prologue.weights_g)],
        products,
        [x.sum(1) for x in (norm_f, norm_g, norm_s) if x is not None],
    )


def _norm_tanh_backward(
    call: _Call, prepared: _Prepared, a: Tensor, grad_y: list[Tensor], gate: int
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `a`, a product's operand, and of the norm, a sum a block."""
    rows = a.shape[1]
    da = torch.empty_like(a, dtype=call.dtype)
    norm = call.empty(call.G, min(rows, _BLOCKS), 2, call.H) if call.has_norm else None
    native = _fill(
        _native.NormTanhBackwardArguments(),
        **_rows(call, rows, _BLOCKS),
        **{"a": a, "norms": prepared.norms, "gate": gate, "eps": call.eps},
        grad_y=grad_y[0],
        grad_y_more=grad_y[1] if len(grad_y) > 1 else None,
        **{"grad_a": da, "grad_a_dtype": call.dtype, "grad_norm": norm},
    )
    call.run("norm_tanh_backward", native)
    return da, norm


def _weight_gradients(
    call: _Call,
    plan: _Plan,
    g: int,
    gates: _Gates,
    grad: _RecurrenceGradient,
    prologue: _PrologueGradient,
) -> Weights:
    """One weight set's, each in memory of its own, as outputs of an op have to be."""
    da = grad.gates[g].flatten(0, 1)  # `[T B, 3, H]`
    operands = gates.f_tilde_h[g], gates.f_tilde_h[g], gates.f_tilde_r_h[g]
    recurrent = [_product(da[:, gate].T, operand) for gate, operand in enumerate(operands)]
    if plan.path != "step" and call.has_norm:
        # The persistent kernel leaves out LayerNorm's mean of dy, the same for all rows.
        for weight in recurrent:
            weight -= weight.mean(0, keepdim=True)
    weights = Weights(*prologue.weights[g], *recurrent)
    if grad.norm is None:
        return weights
    norms = [
        torch.cat([torch.stack([x[g, kind] for x in prologue.norms]), grad.norm[g, kind].sum(1)])
        for kind in range(2)
    ]
    return weights._replace(norm_weight=norms[0], norm_bias=norms[1])
