"""What the GPU engines share: the order of a call, its products, by torch, and its gradient.

Between the products stand an engine's kernels: an object a call, with the methods of `Kernels`.
Backward keeps the states alone and computes the gates again, as products over all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import arguments
from ..reference import Weights, compute_dtype

BLOCKS = 256
"""Of a row-wise kernel that sums over rows, a weight set."""


class Call:
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
        self.T, self.B, _ = inputs[0].shape
        self.G, self.H = len(inputs), weights[0].hidden_size
        self.dtype = inputs[0].dtype
        self.compute = compute_dtype(self.dtype)
        self.mix, self.eps = mix, eps
        self.device = device_of(inputs[0])
        self.index, self.stream = -1, 0
        if inputs[0].is_cuda:
            self.index = inputs[0].device.index
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

    def previous(self, states: Tensor) -> Tensor:
        """The state before each step, `[G, T B, H]`."""
        first = self.hx[:, None] if self.hx is not None else torch.zeros_like(states[:, :1])
        return torch.cat([first, states[:, :-1]], dim=1).flatten(1, 2)

    def operands(self, tensors: list[Tensor]) -> list[Tensor]:
        """In the dtype of a product's operands."""
        return [x.to(self.dtype) for x in tensors]


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows(tensor: Tensor) -> Tensor:
    """`[B, size]` with contiguous rows; a copy only where it has not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of `[..., n, k]` and `[..., k, m]`, summed and returned in the compute dtype."""
    dtype = compute_dtype(a.dtype)
    if a.dtype is dtype:
        return a @ b
    # On a CPU (tests, whose kernels run there), and by ROCm, which refuses out_dtype for 16 bits.
    if not a.is_cuda or torch.version.hip is not None:
        return a.to(dtype) @ b.to(dtype)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)


def each(xs: Any, matrices: Any) -> Tensor:
    """`[G, rows, H]`: each weight set's rows times its matrix; the sizes summed over may differ."""
    products = [product(x, matrix) for x, matrix in zip(xs, matrices, strict=True)]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


class Gates(NamedTuple):
    """What the recurrence's gradient needs of each step."""

    x_hat: Tensor  # `[G, 3, T, B, H]`, the compute dtype
    r_std: Tensor  # `[G, 3, T, B]`
    f_tilde_h: Tensor  # `[G, T B, H]`: what W_r and W_z are multiplied with
    f_tilde_r_h: Tensor  # likewise W_h


class RecurrenceGradient(NamedTuple):
    gates: Tensor  # of the pre-activations r z h: `[G, T, B, 3, H]`, a product's operand
    f_tilde: Tensor  # `[G, T, B, H]`
    hx: Tensor  # `[G, B, H]`
    norm: Tensor | None  # `[G, 2, 3, n, H]`: of norm_weight and norm_bias, in n summands


class MixGradient(NamedTuple):
    a: Tensor  # of LN's operand: `[G, T B, H]`, a product's operand
    f_bar: Tensor | None  # `[G, T B, H]` through Eq. 10; None with mix="concat"
    g_bar: Tensor | None  # likewise, to be summed over the steps
    norm: Tensor | None  # `[G, n, 2, H]`, in n summands


class Kernels(Protocol):
    """An engine's kernels of one call. Rows are (step, sample); dtypes: `Call.dtype` for operands
    of products, `Call.compute` for the rest. Gate numbers are those of `reference.GATES`."""

    removed_mean: bool
    """Whether W_r, W_z and W_h have lost the mean of each column, and with it
    `RecurrenceGradient.gates` LayerNorm's mean of dy."""

    def norm_tanh(self, a: Tensor, gate: int) -> Tensor:
        """tanh(LN(a)) of `[G, rows, H]`, an operand."""

    def norm_tanh_backward(
        self, a: Tensor, grad_y: list[Tensor], gate: int
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `a`, an operand, from one or two that add up to tanh's; and of the norm,
        `[G, n, 2, H]`, in n summands."""

    def mix(self, prologue: Prologue) -> Tensor:
        """f_tilde `[G, rows, H]`, an operand."""

    def mix_backward(self, prologue: Prologue, grad_f_tilde: Tensor) -> MixGradient: ...

    def gate_products(self, x: Tensor, first: int, count: int) -> Tensor:
        """`[G, rows, count H]`: operands `[G, rows, H]` times the transposes of W_r, W_z and W_h,
        from the first-th on."""

    def recurrence(self, input_gates: Tensor) -> Tensor:
        """The states `[G, T, B, H]`."""

    def gates_again(self, prologue: Prologue, states: Tensor) -> Gates: ...

    def recurrence_backward(
        self, gates: Gates, states: Tensor, grad_output: Tensor, grad_h_n: Tensor
    ) -> RecurrenceGradient: ...


class Prologue:
    """Equations 7-10, and the share of f_tilde in the recurrent gates."""

    def __init__(self, call: Call, kernels: Kernels) -> None:
        hidden = call.H
        self.weights_f = call.operands([group.weight_f for group in call.weights])
        self.weights_g = call.operands([group.weight_g for group in call.weights])
        weights_s = call.operands([group.weight_s for group in call.weights])
        self.weights_sf = [w[:, :hidden] for w in weights_s]
        self.weights_sg = [w[:, hidden:] for w in weights_s]
        self.a_f = each(call.inputs, [w.T for w in self.weights_f])
        self.a_g = each(call.contexts, [w.T for w in self.weights_g])
        self.f_bar = kernels.norm_tanh(self.a_f, gate=0)
        self.g_bar = kernels.norm_tanh(self.a_g, gate=1)
        self.a_s = each(self.f_bar, [w.T for w in self.weights_sf])
        self.context_s = each(self.g_bar, [w.T for w in self.weights_sg])
        self.f_tilde = kernels.mix(self)
        self.input_gates = kernels.gate_products(self.f_tilde, 0, 3)


def saved_size(inputs: list[Tensor], hidden_size: int, recompute: bool) -> int:
    """Number of elements that `forward` saves for `backward`: the states."""
    steps, batch, _ = inputs[0].shape
    return len(inputs) * steps * batch * hidden_size


def forward(
    kernels_of: Callable[..., Kernels],
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
    call = Call(inputs, contexts, weights, hx, lengths, mix, eps)
    with call.device:
        kernels = kernels_of(call, backward=False)
        states = kernels.recurrence(Prologue(call, kernels).input_gates)
        output = states.to(call.dtype, copy=save or call.lengths is not None)
        if call.lengths is not None:
            output.masked_fill_(~call.valid()[..., None], 0)
        h_n = states[:, -1].to(call.dtype, copy=True)
    return output, h_n, states.view(-1) if save else states.new_empty(0)


def backward(
    kernels_of: Callable[..., Kernels],
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
    call = Call(inputs, contexts, weights, hx, lengths, mix, eps)
    with call.device:
        kernels = kernels_of(call, backward=True)
        prologue = Prologue(call, kernels)
        states = saved.view(call.G, call.T, call.B, call.H)
        gates = kernels.gates_again(prologue, states)
        grad = kernels.recurrence_backward(gates, states, grad_output, grad_h_n)
        rest = _prologue_backward(call, kernels, prologue, grad.f_tilde, need_input, need_weights)
        grad_weights = []
        if need_weights:
            grad_weights = [
                _weight_gradients(call, kernels, g, gates, grad, rest).like(weights[g])
                for g in range(call.G)
            ]
    return (
        [x.view_as(input).to(call.dtype) for x, input in zip(rest.inputs, inputs, strict=False)],
        [x.to(call.dtype) for x in rest.contexts],
        grad_weights,
        grad.hx.to(call.dtype),
    )


class _PrologueGradient(NamedTuple):
    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[tuple[Tensor, Tensor, Tensor]]  # W_f, W_g, W_s
    norms: list[Tensor]  # f g s: `[G, 2, H]`


def _prologue_backward(
    call: Call,
    kernels: Kernels,
    prologue: Prologue,
    grad_f_tilde: Tensor,
    need_input: bool,
    need_weights: bool,
) -> _PrologueGradient:
    da_s, grad_f_bar, grad_g_bar, norm_s = kernels.mix_backward(prologue, grad_f_tilde)
    through_s = each(da_s, prologue.weights_sf)
    to_f_bar = [x for x in (grad_f_bar, through_s) if x is not None]
    da_f, norm_f = kernels.norm_tanh_backward(prologue.a_f, to_f_bar, gate=0)
    da_s_context = da_s.view(call.G, call.T, call.B, call.H).sum(1, dtype=call.compute)
    context_weights = [w.to(call.compute) for w in prologue.weights_sg]
    to_context = [each(da_s_context, context_weights)]
    if grad_g_bar is not None:
        to_context.append(grad_g_bar.view(call.G, call.T, call.B, call.H).sum(1))
    da_g, norm_g = kernels.norm_tanh_backward(prologue.a_g, to_context, gate=1)

    products = []
    if need_weights:
        g_bar = prologue.g_bar.to(call.compute)
        for g in range(call.G):
            halves = (
                product(da_s[g].T, prologue.f_bar[g]),
                product(da_s_context[g].T, g_bar[g]),
            )
            weight_f = product(da_f[g].T, call.inputs[g])
            weight_g = product(da_g[g].T, call.contexts[g])
            products.append((weight_f, weight_g, torch.cat(halves, dim=1)))
    return _PrologueGradient(
        [product(da_f[g], w) for g, w in enumerate(prologue.weights_f)] if need_input else [],
        [product(da_g[g], w) for g, w in enumerate(prologue.weights_g)],
        products,
        [x.sum(1) for x in (norm_f, norm_g, norm_s) if x is not None],
    )


def _weight_gradients(
    call: Call,
    kernels: Kernels,
    g: int,
    gates: Gates,
    grad: RecurrenceGradient,
    prologue: _PrologueGradient,
) -> Weights:
    """One weight set's, each in memory of its own, as outputs of an op have to be."""
    da = grad.gates[g].flatten(0, 1)  # `[T B, 3, H]`
    operands = gates.f_tilde_h[g], gates.f_tilde_h[g], gates.f_tilde_r_h[g]
    recurrent = [product(da[:, gate].T, operand) for gate, operand in enumerate(operands)]
    if kernels.removed_mean:
        # LayerNorm's mean of dy, which `gates` lack, is the same for all rows.
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
