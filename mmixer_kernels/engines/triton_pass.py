"""A pass of the Triton engine: its products, by torch, its kernels between them, and its gradient.

Backward keeps the states alone and computes the gates again, as products over all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..problem import (
    GATES,
    Cotangents,
    Gradients,
    Keep,
    Need,
    Problem,
    Step,
    Weights,
    compute_dtype,
)
from . import native, triton_kernels, triton_tuning

BLOCK_B = 16  # samples of a program of the recurrence: the least that a product takes
BLOCK_M = 64  # rows of a program of the products over all steps
_MOST_SUMMANDS = 256  # programs per weight set of a kernel that sums over rows; each writes one


def step(step: Step) -> Tensor:
    """One step without gradients in one launch: the next state `[B, H]`."""
    input, context, weights, hx, mix, eps = step
    B, H = input.shape[0], weights.hidden_size
    dtype, compute = input.dtype, compute_dtype(input.dtype)
    input = native.rows(input, dtype)
    has_context = context is not None
    context = input if context is None else native.rows(context, dtype)
    state = input if hx is None else native.rows(hx, dtype)
    matrices = weights.map(Tensor.contiguous)[: len(GATES)]
    norms = None
    if weights.norm_weight is not None:
        norms = torch.cat(weights.norms()).to(compute)
    output = input.new_empty(B, H)
    f_g = input.new_empty(B, 2 * H) if has_context else None
    state_operand = torch.empty_like(output)
    mixed, a = (input.new_empty(*shape, dtype=compute) for shape in ((B, H), (2, B, H)))
    with native.device_of(input):
        triton_kernels.step[(-(-B // BLOCK_B),)](
            *(input, input.stride(0), context, context.stride(0), state, state.stride(0)),
            *(*matrices, norms, f_g, state_operand, mixed, a, output),
            *(B, input.shape[1], context.shape[1], H),
            eps=eps,
            NORM_ROWS=0 if weights.norm_weight is None else weights.norm_weight.shape[0],
            HAS_CONTEXT=has_context,
            HAS_HX=hx is not None,
            CONCAT=mix == "concat",
            BLOCK_B=BLOCK_B,
            **_product_options(H, input),
        )
    return output


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`: the states."""
    this, save = Pass(problem), keep != "nothing"
    with native.device_of(problem.inputs[0]):
        states = this.recurrence(this.prologue().input_gates)
        output = states.to(this.dtype, copy=save or this.valid is not None)
        if this.valid is not None:
            output.masked_fill_(~this.valid, 0)
        ends = [0 if reverse else -1 for reverse in this.reverse]
        h_n = torch.stack([x[end] for x, end in zip(states, ends, strict=True)]).to(this.dtype)
    return output, h_n, states.view(-1) if save else None


def backward(problem: Problem, saved: Tensor, cotangents: Cotangents, need: Need) -> Gradients:
    """The gradients, from the states that `forward` left."""
    this = Pass(problem)
    with native.device_of(problem.inputs[0]):
        prologue = this.prologue()
        gates = this.gates(prologue, saved.view(this.G, this.T, this.B, this.H))
        grad = this.recurrence_backward(gates, *cotangents.filled(problem))
        rest = this.prologue_backward(prologue, grad.f_tilde, need)
        grad_weights = []
        if need.weights:
            grad_weights = [
                _weight_gradients(g, gates, grad, rest).to_dtypes_of(weights)
                for g, weights in enumerate(problem.weights)
            ]
    return Gradients(
        [x.view_as(y).to(this.dtype) for x, y in zip(rest.inputs, problem.inputs, strict=False)],
        [x.to(this.dtype) for x in rest.contexts],
        grad_weights,
        grad.hx.to(this.dtype),
    )


class Mixture(NamedTuple):
    """The results of equations 8-10, which a call without context does not have."""

    a_g: Tensor  # `[G, B, H]`
    a_s: Tensor  # `[G, T B, H]`: the share of f_bar in W_s's product
    a_s_context: Tensor  # `[G, B, H]`: the share of g_bar
    g_bar: Tensor  # `[G, B, H]`, an operand
    f_tilde: Tensor  # `[G, T B, H]`, an operand


class Prologue(NamedTuple):
    """Equations 7-10, and the share of f_tilde in the recurrent gates. What is called an operand
    has the dtype of products' operands, all else is in the compute dtype."""

    a_f: Tensor  # `[G, T B, H]`
    f_bar: Tensor  # `[G, T B, H]`, an operand
    mixture: Mixture | None
    f_tilde: Tensor  # `[G, T B, H]`, an operand: without context f_bar itself
    input_gates: Tensor  # `[G, T B, 3 H]`


class Gates(NamedTuple):
    """The values of each step that the recurrence's gradient needs."""

    previous: Tensor  # the state before each step: `[G, T B, H]`
    x_hat: Tensor  # `[G, 3, T, B, H]`
    r_std: Tensor  # `[G, 3, T, B]`
    f_tilde_h: Tensor  # `[G, T B, H]`, an operand: what W_r and W_z are multiplied with
    f_tilde_r_h: Tensor  # likewise W_h


class RecurrenceGradient(NamedTuple):
    """The results of the recurrence's backward."""

    gates: Tensor  # of the pre-activations r z h: `[G, T, B, 3, H]`, an operand
    f_tilde: Tensor  # `[G, T, B, H]`
    hx: Tensor  # `[G, B, H]`
    norm: Tensor | None  # `[G, 2, 3, n, H]`: of norm_weight and norm_bias, in n summands


class MixtureGradient(NamedTuple):
    """The results of the backward of equations 8-10."""

    f_bar: list[Tensor]  # one or two that add up to it
    contexts: list[Tensor]
    weights: Sequence[tuple[Tensor | None, Tensor | None]]  # W_g, W_s
    norms: list[Tensor | None]  # g s, `Pass._norm_sums`


class PrologueGradient(NamedTuple):
    """The results of the prologue's backward."""

    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[tuple[Tensor, Tensor | None, Tensor | None]]  # W_f, W_g, W_s
    norms: list[Tensor]  # f, with context f g s: `[G, 2, H]`


class Pass:
    """The operands of a pass as products and kernels take them, the kernels' options, and the parts
    of a pass. Rows are (step, sample)."""

    def __init__(self, problem: Problem) -> None:
        inputs, self.contexts, sets, hx, lengths, mix, eps, _ = problem
        self.reverse = problem.directions
        self.G, self.T, self.B, self.H = problem.sizes
        self.dtype, self.compute = problem.dtype, problem.compute_dtype
        self.lengths = self.valid = None
        if lengths is not None:
            arguments.check_lengths(lengths, self.T, self.B, inputs[0])
            self.lengths = lengths.to(torch.int64).contiguous()
            times = torch.arange(self.T, device=lengths.device)
            self.valid = (times[:, None] < self.lengths)[..., None]  # `[T, B, 1]`
            inputs = [torch.where(self.valid, x, 0) for x in inputs]
        self.inputs = [x.reshape(self.T * self.B, -1) for x in inputs]
        self.hx = None if hx is None else hx.to(self.compute).contiguous()
        matrices = [[x.contiguous().to(self.dtype) for x in w.matrices()] for w in sets]
        self.weights_f = [f for f, *_ in matrices]
        if problem.has_context:
            self.weights_g = [g for _, g, *_ in matrices]
            self.weights_sf = [s[:, : self.H] for _, _, s, *_ in matrices]  # the half for f_bar
            self.weights_sg = [s[:, self.H :] for _, _, s, *_ in matrices]  # the half for g_bar
        self.recurrent = tuple(x for w in matrices for x in w[-3:])
        self.norms = None  # `[2 G, NORM_ROWS, H]`
        if sets[0].norm_weight is not None:
            norms = [w.norm_weight for w in sets] + [w.norm_bias for w in sets]
            self.norms = torch.stack([x for x in norms if x is not None]).to(self.compute)
        norm_rows = {"NORM_ROWS": 0 if self.norms is None else self.norms.shape[1]}
        self.eps, self.mix = eps, mix
        block = max(16, 1 << (self.H - 1).bit_length())
        self.row_options = {"eps": eps, **norm_rows, "BLOCK_H": block}
        self.product_options = {"SETS": self.G, **_product_options(self.H, inputs[0])}
        self.recurrence_options = {
            **self.product_options,
            **norm_rows,
            "HAS_LENGTHS": lengths is not None,
            "BIDIRECTIONAL": problem.bidirectional,
            "BLOCK_B": BLOCK_B,
        }
        self.tiles = -(-self.B // BLOCK_B)  # programs of the recurrence per weight set

    def prologue(self) -> Prologue:
        """The prologue: four products of torch, without context one, and kernels between."""
        a_f = grouped_product(self.inputs, [w.T for w in self.weights_f])
        f_bar = self._norm_tanh(a_f, "f")
        mixture = self._mixture(f_bar) if self.contexts else None
        f_tilde = f_bar if mixture is None else mixture.f_tilde
        return Prologue(a_f, f_bar, mixture, f_tilde, self._gate_products(f_tilde, 0, 3))

    def _mixture(self, f_bar: Tensor) -> Mixture:
        a_g = grouped_product(self.contexts, [w.T for w in self.weights_g])
        g_bar = self._norm_tanh(a_g, "g")
        a_s = grouped_product(f_bar, [w.T for w in self.weights_sf])
        a_s_context = grouped_product(g_bar, [w.T for w in self.weights_sg])
        f_tilde, rows = torch.empty_like(f_bar), f_bar.shape[1]
        triton_kernels.mix[rows, self.G](
            *(a_s, a_s_context, self.norms, f_bar, g_bar, f_tilde, self.G, rows, self.B, self.H),
            CONCAT=self.mix == "concat",
            **self.row_options,
        )
        return Mixture(a_g, a_s, a_s_context, g_bar, f_tilde)

    def recurrence(self, input_gates: Tensor) -> Tensor:
        """The states `[G, T, B, H]`."""
        states = self._empty(self.G, self.T, self.B, self.H)
        operands = self._empty(2, self.G, self.B, self.H, dtype=self.dtype)
        a = torch.empty_like(operands, dtype=self.compute)
        triton_kernels.recurrence[self.tiles, self.G](
            *(input_gates, self.recurrent, self.norms, self.hx, self.lengths, states, operands, a),
            *(self.T, self.B, self.H),
            eps=self.eps,
            HAS_HX=self.hx is not None,
            **self.recurrence_options,
        )
        return states

    def gates(self, prologue: Prologue, states: Tensor) -> Gates:
        """The gates of all steps."""
        first = self.hx[:, None] if self.hx is not None else torch.zeros_like(states[:, :1])
        previous = torch.cat(
            [
                part
                for x, y, reverse in zip(first, states, self.reverse, strict=True)
                for part in ((y[1:], x) if reverse else (x, y[:-1]))
            ]
        ).view(self.G, -1, self.H)
        operand = previous.to(self.dtype)
        x_hat = self._empty(self.G, 3, self.T, self.B, self.H)
        r_std = self._empty(self.G, 3, self.T, self.B)
        r_h, f_tilde_h, f_tilde_r_h = (torch.empty_like(operand) for _ in range(3))
        state_gates = self._gate_products(operand, 0, 2)
        rows = self.T * self.B
        triton_kernels.reset_gate[rows, self.G](
            *(prologue.input_gates, state_gates, prologue.f_tilde, previous, self.norms),
            *(x_hat, r_std, r_h, f_tilde_h, f_tilde_r_h, self.G, rows, self.H),
            **self.row_options,
        )
        candidate = self._gate_products(r_h, 2, 1)
        triton_kernels.update_gate[rows, self.G](
            *(prologue.input_gates, state_gates, candidate, x_hat, r_std, rows, self.H),
            **self.row_options,
        )
        return Gates(previous, x_hat, r_std, f_tilde_h, f_tilde_r_h)

    def recurrence_backward(
        self, gates: Gates, grad_output: Tensor, grad_h_n: Tensor
    ) -> RecurrenceGradient:
        """The gradient of all that the recurrence reads."""
        grad_output = native.rows(grad_output, grad_output.dtype)
        grad = RecurrenceGradient(
            self._empty(self.G, self.T, self.B, 3, self.H, dtype=self.dtype),
            self._empty(self.G, self.T, self.B, self.H),
            grad_h_n.to(self.compute, copy=True).contiguous(),  # The kernel makes hx's of h_n's.
            None if self.norms is None else self._empty(self.G, 2, 3, self.tiles, self.H),
        )
        triton_kernels.recurrence_backward[self.tiles, self.G](
            *(gates.x_hat, gates.r_std, self.recurrent, self.norms, gates.previous, self.lengths),
            *(grad_output, *grad_output.stride()[:3]),
            *(grad.hx, grad.gates, grad.f_tilde, grad.norm),
            *(self._empty(2, self.G, self.B, self.H), self.T, self.B, self.H),
            **self.recurrence_options,
        )
        return grad

    def prologue_backward(
        self, prologue: Prologue, grad_f_tilde: Tensor, need: Need
    ) -> PrologueGradient:
        """The gradient of all that the prologue reads but W_r, W_z and W_h."""
        if prologue.mixture is None:
            of_context = [(None, None)] * self.G if need.weights else []
            mixture = MixtureGradient([grad_f_tilde], [], of_context, [])
        else:
            mixture = self._mixture_backward(prologue.f_bar, prologue.mixture, grad_f_tilde, need)
        da_f, norm_f = self._norm_tanh_backward(prologue.a_f, mixture.f_bar, "f")
        return PrologueGradient(
            [product(da_f[g], w) for g, w in enumerate(self.weights_f)] if need.input else [],
            mixture.contexts,
            [(product(da_f[g].T, self.inputs[g]), *w) for g, w in enumerate(mixture.weights)],
            [x.sum(1) for x in (norm_f, *mixture.norms) if x is not None],
        )

    def _mixture_backward(
        self, f_bar: Tensor, mixture: Mixture, grad_f_tilde: Tensor, need: Need
    ) -> MixtureGradient:
        rows, shape = self.T * self.B, (self.G, self.T, self.B, self.H)
        da_s, norm_s = torch.empty_like(f_bar), self._norm_sums(rows)
        to_f_bar = to_g_bar = None  # the gradients through Eq. 10
        if self.mix == "gated":
            to_f_bar, to_g_bar = self._empty(*shape), self._empty(*shape)
        triton_kernels.mix_backward[min(rows, _MOST_SUMMANDS), self.G](
            *(mixture.a_s, mixture.a_s_context, self.norms, f_bar, mixture.g_bar),
            *(grad_f_tilde, da_s, to_f_bar, to_g_bar, norm_s, self.G, rows, self.B, self.H),
            CONCAT=self.mix == "concat",
            **self.row_options,
        )
        through_s = grouped_product(da_s, self.weights_sf)
        da_s_context = da_s.view(shape).sum(1, dtype=self.compute)
        wide_weights = [w.to(self.compute) for w in self.weights_sg]
        all_to_g_bar = [grouped_product(da_s_context, wide_weights)]
        if to_g_bar is not None:
            all_to_g_bar.append(to_g_bar.sum(1))
        da_g, norm_g = self._norm_tanh_backward(mixture.a_g, all_to_g_bar, "g")

        weights = []
        if need.weights:
            wide_g_bar = mixture.g_bar.to(self.compute)
            for g in range(self.G):
                halves = (
                    product(da_s[g].T, f_bar[g]),
                    product(da_s_context[g].T, wide_g_bar[g]),
                )
                weights.append((product(da_g[g].T, self.contexts[g]), torch.cat(halves, dim=1)))
        return MixtureGradient(
            [through_s] if to_f_bar is None else [to_f_bar, through_s],
            [product(da_g[g], w) for g, w in enumerate(self.weights_g)],
            weights,
            [norm_g, norm_s],
        )

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the call's device, in the compute dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self.compute, device=self.inputs[0].device)

    def _norm_sums(self, rows: int) -> Tensor | None:
        """Memory for the gradient of one gate's norm, `[G, n, 2, H]` in n summands."""
        if self.norms is None:
            return None
        return self._empty(self.G, min(rows, _MOST_SUMMANDS), 2, self.H)

    def _gate_products(self, x: Tensor, first: int, count: int) -> Tensor:
        """`[G, rows, count H]`: operands `[G, rows, H]` times the transposes of W_r, W_z and W_h,
        from the first-th on."""
        rows, columns = x.shape[1], self.product_options["BLOCK_N"]
        y = self._empty(self.G, rows, count * self.H)
        triton_kernels.products[-(-rows // BLOCK_M), -(-self.H // columns), self.G * count](
            *(x, self.recurrent, y, rows, self.H),
            FIRST=first,
            COUNT=count,
            BLOCK_M=BLOCK_M,
            **self.product_options,
        )
        return y

    def _norm_tanh(self, a: Tensor, gate: str) -> Tensor:
        """tanh(LN(a)) of `[G, rows, H]`, an operand."""
        y, rows = torch.empty_like(a, dtype=self.dtype), a.shape[1]
        triton_kernels.norm_tanh[rows, self.G](
            *(a, self.norms, y, self.G, rows, self.H, GATES.index(gate)), **self.row_options
        )
        return y

    def _norm_tanh_backward(
        self, a: Tensor, grad_y: list[Tensor], gate: str
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `a`, an operand, and of the norm, `_norm_sums`.

        Args:
            grad_y: one or two tensors whose sum is the gradient of the tanh.
        """
        rows = a.shape[1]
        da, norm = torch.empty_like(a, dtype=self.dtype), self._norm_sums(rows)
        more = grad_y[1] if len(grad_y) > 1 else None
        triton_kernels.norm_tanh_backward[min(rows, _MOST_SUMMANDS), self.G](
            *(a, grad_y[0], more, self.norms, da, norm),
            *(self.G, rows, self.H, GATES.index(gate)),
            HAS_MORE=more is not None,
            **self.row_options,
        )
        return da, norm


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of `[n, k]` and `[k, m]`, summed and returned in the compute dtype."""
    dtype = compute_dtype(a.dtype)
    if a.dtype is dtype:
        return a @ b
    # On a CPU (tests, whose kernels run there), and by ROCm, which refuses out_dtype for 16 bits.
    if not a.is_cuda or torch.version.hip is not None:
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def grouped_product(xs: Iterable[Tensor], matrices: Iterable[Tensor]) -> Tensor:
    """`[G, rows, H]`: each weight set's rows times its matrix; the sizes summed over may differ."""
    products = [product(x, matrix) for x, matrix in zip(xs, matrices, strict=True)]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def _weight_gradients(
    g: int, gates: Gates, grad: RecurrenceGradient, prologue: PrologueGradient
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


def _product_options(hidden: int, input: Tensor) -> dict[str, Any]:
    """The options of a kernel with products of operands like `input`."""
    highest = native.matmul_precision() == "highest"
    return {
        **triton_tuning.configuration(hidden, input.dtype, input.device)._asdict(),
        "PRECISION": "tf32" if input.dtype is torch.float32 and not highest else "ieee",
    }
