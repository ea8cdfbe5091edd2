"""The half of the Triton engine that is torch's: a call's order, its products and its gradient.

Between the products stand the kernels: one object per call, with the methods of `Kernels`.
Backward keeps the states alone and computes the gates again, as products over all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import arguments
from ..problem import GATES, Cotangents, Gradients, Keep, Need, Problem, Weights, compute_dtype

BLOCKS = 256
"""Blocks per weight set of the kernels that sum over rows; each writes one summand."""


class Call:
    """The operands, in the order and the dtypes in which the kernels take them."""

    def __init__(self, problem: Problem) -> None:
        inputs, contexts, weights, hx, lengths, self.mix, self.eps = problem
        self.G, self.T, self.B, self.H = problem.sizes
        self.dtype, self.compute = problem.dtype, problem.compute_dtype
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
        self.weights_f = self.operands([group.weight_f for group in self.weights])
        self.weights_g = self.operands([group.weight_g for group in self.weights])
        weights_s = self.operands([group.weight_s for group in self.weights])
        self.weights_sf = [w[:, : self.H] for w in weights_s]  # the half that f_bar has
        self.weights_sg = [w[:, self.H :] for w in weights_s]  # the half that g_bar has

    def valid(self) -> Tensor:
        """`[T, B]`: whether a step is inside its sample's length."""
        assert self.lengths is not None
        return torch.arange(self.T, device=self.lengths.device)[:, None] < self.lengths

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the call's device, in the compute dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self.compute, device=self.inputs[0].device)

    def norm_sums(self, rows: int) -> Tensor | None:
        """Memory for the gradient of one gate's norm, `[G, n, 2, H]` in n summands."""
        return self.empty(self.G, min(rows, BLOCKS), 2, self.H) if self.has_norm else None

    def previous(self, states: Tensor) -> Tensor:
        """The state before each step, `[G, T B, H]`."""
        first = self.hx[:, None] if self.hx is not None else torch.zeros_like(states[:, :1])
        return torch.cat([first, states[:, :-1]], dim=1).flatten(1, 2)

    def operands(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors in the dtype of a product's operands."""
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


def grouped_product(xs: Any, matrices: Any) -> Tensor:
    """`[G, rows, H]`: each weight set's rows times its matrix; the sizes summed over may differ."""
    products = [product(x, matrix) for x, matrix in zip(xs, matrices, strict=True)]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


class Gates(NamedTuple):
    """The values of each step that the recurrence's gradient needs."""

    x_hat: Tensor  # `[G, 3, T, B, H]`, in the compute dtype
    r_std: Tensor  # `[G, 3, T, B]`
    f_tilde_h: Tensor  # `[G, T B, H]`: what W_r and W_z are multiplied with
    f_tilde_r_h: Tensor  # likewise W_h


class RecurrenceGradient(NamedTuple):
    """The results of the recurrence's backward; hx's begins as h_n's."""

    gates: Tensor  # of the pre-activations r z h: `[G, T, B, 3, H]`, a product's operand
    f_tilde: Tensor  # `[G, T, B, H]`
    hx: Tensor  # `[G, B, H]`
    norm: Tensor | None  # `[G, 2, 3, n, H]`: of norm_weight and norm_bias, in n summands

    @classmethod
    def empty(cls, call: Call, grad_h_n: Tensor, norm_summands: int) -> RecurrenceGradient:
        """Memory for all of it, with h_n's gradient where hx's will be."""
        G, T, B, H = call.G, call.T, call.B, call.H
        return cls(
            call.empty(G, T, B, 3, H, dtype=call.dtype),
            call.empty(G, T, B, H),
            grad_h_n.to(call.compute, copy=True).contiguous(),
            call.empty(G, 2, 3, norm_summands, H) if call.has_norm else None,
        )


class MixGradient(NamedTuple):
    """The results of the backward of Eq. 9-10."""

    a: Tensor  # of LN's operand: `[G, T B, H]`, a product's operand
    f_bar: Tensor | None  # `[G, T B, H]` through Eq. 10; None with mix="concat"
    g_bar: Tensor | None  # likewise, to be summed over the steps
    norm: Tensor | None  # `[G, n, 2, H]`, in n summands

    @classmethod
    def empty(cls, call: Call) -> MixGradient:
        """Memory for all of it."""
        rows = call.T * call.B
        a = call.empty(call.G, rows, call.H, dtype=call.dtype)
        f_bar = g_bar = None
        if call.mix == "gated":
            f_bar, g_bar = (call.empty(call.G, rows, call.H) for _ in range(2))
        return cls(a, f_bar, g_bar, call.norm_sums(rows))


class Kernels(Protocol):
    """The kernels of one call. Rows are (step, sample); dtypes: `Call.dtype` for operands
    of products, `Call.compute` for the rest. Gate numbers are those of `problem.GATES`."""

    norm_summands: int
    """Summands of the gradient of the recurrent gates' norms."""

    def norm_tanh(self, a: Tensor, gate: int) -> Tensor:
        """tanh(LN(a)) of `[G, rows, H]`, an operand."""

    def norm_tanh_backward(
        self, a: Tensor, grad_y: list[Tensor], gate: int
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `a`, an operand, and of the norm, `Call.norm_sums`.

        Args:
            grad_y: one or two tensors whose sum is the gradient of the tanh.
        """

    def mix(self, operands: MixOperands) -> Tensor:
        """f_tilde `[G, rows, H]`, an operand."""

    def mix_backward(self, operands: MixOperands, grad_f_tilde: Tensor, into: MixGradient) -> None:
        """Fills `into`."""

    def gate_products(self, x: Tensor, first: int, count: int) -> Tensor:
        """`[G, rows, count H]`: operands `[G, rows, H]` times the transposes of W_r, W_z and W_h,
        from the first-th on."""

    def recurrence(self, input_gates: Tensor) -> Tensor:
        """The states `[G, T, B, H]`."""

    def gates_again(self, prologue: Prologue, states: Tensor) -> Gates:
        """The gates of all steps, from the states that forward left."""

    def recurrence_backward(
        self, gates: Gates, states: Tensor, grad_output: Tensor, into: RecurrenceGradient
    ) -> None:
        """Fills `into`, from the gradient of the output, whose last dimension is contiguous."""


class MixOperands(NamedTuple):
    """The operands of Eq. 9-10, or of experiment II's f_tilde."""

    a: Tensor  # the share of f_bar in W_s's product: `[G, T B, H]`
    context: Tensor  # the share of g_bar: `[G, B, H]`
    f_bar: Tensor  # `[G, T B, H]`, an operand
    g_bar: Tensor  # `[G, B, H]`, an operand


class Prologue(NamedTuple):
    """Equations 7-10, and the share of f_tilde in the recurrent gates."""

    a_f: Tensor  # `[G, T B, H]`
    a_g: Tensor  # `[G, B, H]`
    mix: MixOperands
    f_tilde: Tensor  # `[G, T B, H]`, an operand
    input_gates: Tensor  # `[G, T B, 3 H]`

    @classmethod
    def compute(cls, call: Call, kernels: Kernels) -> Prologue:
        """The prologue of a call, by four products and four kernels."""
        a_f = grouped_product(call.inputs, [w.T for w in call.weights_f])
        a_g = grouped_product(call.contexts, [w.T for w in call.weights_g])
        f_bar = kernels.norm_tanh(a_f, GATES.index("f"))
        g_bar = kernels.norm_tanh(a_g, GATES.index("g"))
        mix = MixOperands(
            grouped_product(f_bar, [w.T for w in call.weights_sf]),
            grouped_product(g_bar, [w.T for w in call.weights_sg]),
            f_bar,
            g_bar,
        )
        f_tilde = kernels.mix(mix)
        return cls(a_f, a_g, mix, f_tilde, kernels.gate_products(f_tilde, 0, 3))


def saved_size(problem: Problem, keep: Keep) -> int:
    """Number of elements that `forward` leaves for `backward`: the states."""
    groups, steps, batch, hidden = problem.sizes
    return 0 if keep == "nothing" else groups * steps * batch * hidden


def forward(
    kernels_of: Callable[..., Kernels], problem: Problem, keep: Keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    call, save = Call(problem), keep != "nothing"
    with call.device:
        kernels = kernels_of(call, backward=False)
        states = kernels.recurrence(Prologue.compute(call, kernels).input_gates)
        output = states.to(call.dtype, copy=save or call.lengths is not None)
        if call.lengths is not None:
            output.masked_fill_(~call.valid()[..., None], 0)
        h_n = states[:, -1].to(call.dtype, copy=True)
    return output, h_n, states.view(-1) if save else states.new_empty(0)


def backward(
    kernels_of: Callable[..., Kernels],
    problem: Problem,
    saved: Tensor,
    cotangents: Cotangents,
    need: Need,
) -> Gradients:
    """The gradients, from the states that `forward` left."""
    call, (grad_output, grad_h_n) = Call(problem), cotangents.filled(problem)
    if grad_output.stride(-1) != 1 and grad_output.shape[-1] > 1:
        grad_output = grad_output.contiguous()
    with call.device:
        kernels = kernels_of(call, backward=True)
        prologue = Prologue.compute(call, kernels)
        states = saved.view(call.G, call.T, call.B, call.H)
        gates = kernels.gates_again(prologue, states)
        grad = RecurrenceGradient.empty(call, grad_h_n, kernels.norm_summands)
        kernels.recurrence_backward(gates, states, grad_output, grad)
        rest = _prologue_backward(call, kernels, prologue, grad.f_tilde, need)
        grad_weights = []
        if need.weights:
            grad_weights = [
                _weight_gradients(g, gates, grad, rest).to_dtypes_of(weights)
                for g, weights in enumerate(problem.weights)
            ]
    return Gradients(
        [x.view_as(y).to(call.dtype) for x, y in zip(rest.inputs, problem.inputs, strict=False)],
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
    call: Call, kernels: Kernels, prologue: Prologue, grad_f_tilde: Tensor, need: Need
) -> _PrologueGradient:
    mixed = MixGradient.empty(call)
    kernels.mix_backward(prologue.mix, grad_f_tilde, mixed)
    through_s = grouped_product(mixed.a, call.weights_sf)
    to_f_bar = [x for x in (mixed.f_bar, through_s) if x is not None]
    da_f, norm_f = kernels.norm_tanh_backward(prologue.a_f, to_f_bar, GATES.index("f"))
    da_s_context = mixed.a.view(call.G, call.T, call.B, call.H).sum(1, dtype=call.compute)
    context_weights = [w.to(call.compute) for w in call.weights_sg]
    to_context = [grouped_product(da_s_context, context_weights)]
    if mixed.g_bar is not None:
        to_context.append(mixed.g_bar.view(call.G, call.T, call.B, call.H).sum(1))
    da_g, norm_g = kernels.norm_tanh_backward(prologue.a_g, to_context, GATES.index("g"))

    products = []
    if need.weights:
        g_bar = prologue.mix.g_bar.to(call.compute)
        for g in range(call.G):
            halves = (
                product(mixed.a[g].T, prologue.mix.f_bar[g]),
                product(da_s_context[g].T, g_bar[g]),
            )
            weight_f = product(da_f[g].T, call.inputs[g])
            weight_g = product(da_g[g].T, call.contexts[g])
            products.append((weight_f, weight_g, torch.cat(halves, dim=1)))
    return _PrologueGradient(
        [product(da_f[g], w) for g, w in enumerate(call.weights_f)] if need.input else [],
        [product(da_g[g], w) for g, w in enumerate(call.weights_g)],
        products,
        [x.sum(1) for x in (norm_f, norm_g, mixed.norm) if x is not None],
    )


def _weight_gradients(
    g: int,
    gates: Gates,
    grad: RecurrenceGradient,
    prologue: _PrologueGradient,
) -> Weights:
    """One weight set's, each in memory of its own, as outputs of an op have to be."""
    da = grad.gates[g].flatten(0, 1)  # `[T B, 3, H]`
    operands = gates.f_tilde_h[g], gates.f_tilde_h[g], gates.f_tilde_r_h[g]
    recurrent = [product(da[:, gate].T, operand) for gate, operand in enumerate(operands)]
    weights = Weights(*prologue.weights[g], *recurrent)
    if grad.norm is None:
        return weights
    norms = [
        torch.cat([torch.stack([x[g, kind] for x in prologue.norms]), grad.norm[g, kind].sum(1)])
        for kind in range(2)
    ]
    return weights._replace(norm_weight=norms[0], norm_bias=norms[1])
