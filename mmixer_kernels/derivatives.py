"""The ops under the derivatives of `torch.func`, which follow functions of tensors, not of lists.

`torch.func.grad`, `vjp` and `jacrev`, and `vmap` around and inside them, run the fused forward and
backward. The second derivative is the reference's, of ordinary operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, batching
from .engines import reference
from .reference import Weights


def forward(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
    engine: str,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mcu_forward`, saving for a backward."""
    form = _Form(len(inputs), hx is not None, lengths is not None, mix, eps, engine, recompute)
    result: tuple[Tensor, Tensor, Tensor] = _Forward.apply(
        form, *form.tensors(inputs, contexts, weights, hx, lengths)
    )
    return result


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    saved: Tensor,
    mix: str,
    eps: float,
    engine: str,
    recompute: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`mcu_backward`."""
    form = _Form(len(inputs), hx is not None, lengths is not None, mix, eps, engine, recompute)
    needs = need_input, need_weights
    tensors = form.tensors(inputs, contexts, weights, hx, lengths)
    *grads, grad_hx = _Backward.apply(form, needs, grad_output, grad_h_n, saved, *tensors)
    first = len(inputs) if need_input else 0
    second = first + len(contexts)
    return grads[:first], grads[first:second], grads[second:], grad_hx


class _Form(NamedTuple):
    """What a call is beside its tensors."""

    groups: int
    has_hx: bool
    has_lengths: bool
    mix: str
    eps: float
    engine: str
    recompute: bool

    def tensors(self, *operands: Any) -> list[Any]:
        """Inputs, contexts, weights, hx and lengths, without those that there are not."""
        inputs, contexts, weights, hx, lengths = operands
        optional = [x for x, given in ((hx, self.has_hx), (lengths, self.has_lengths)) if given]
        return [*inputs, *contexts, *weights, *optional]

    def operands(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """`tensors` backward."""
        *tensors, lengths = tensors if self.has_lengths else (*tensors, None)
        *tensors, hx = tensors if self.has_hx else (*tensors, None)
        first, second = self.groups, 2 * self.groups
        return tensors[:first], tensors[first:second], tensors[second:], hx, lengths

    @property
    def options(self) -> tuple[str, float, str]:
        return self.mix, self.eps, self.engine


class _Forward(Function):
    @staticmethod
    def forward(form: _Form, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.mmixer_kernels.mcu_forward(
            *form.operands(tensors), *form.options, True, form.recompute
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.form, *tensors = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.set_materialize_grads(False)  # They would be as large as what is saved.

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        form, (saved, *tensors) = ctx.form, ctx.saved_tensors
        inputs, contexts, weights, hx, lengths = form.operands(tensors)
        needed = form.operands(ctx.needs_input_grad[1:])
        need_input, need_weights = any(needed[0]), any(needed[2])
        steps, batch, _ = inputs[0].shape
        hidden = len(weights[3])
        if grad_output is None:
            grad_output = inputs[0].new_zeros(()).expand(form.groups, steps, batch, hidden)
        if grad_h_n is None:
            grad_h_n = inputs[0].new_zeros(()).expand(form.groups, batch, hidden)
        of_inputs, of_contexts, of_weights, of_hx = backward(
            grad_output,
            grad_h_n,
            inputs,
            contexts,
            weights,
            hx,
            lengths,
            saved,
            form.mix,
            form.eps,
            form.engine,
            form.recompute,
            need_input,
            need_weights,
        )
        grads = (
            of_inputs if need_input else [None] * len(inputs),
            of_contexts,
            of_weights if need_weights else [None] * len(weights),
            of_hx,
        )
        return None, *form.tensors(*grads, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], form: _Form, *tensors: Tensor) -> tuple[Any, Any]:
        arguments = *form.operands(tensors), *form.options, True, form.recompute
        return batching.forward(forward, info, form.operands(in_dims[1:]), *arguments)


class _Backward(Function):
    """The gradients as one tuple, of inputs and weights as they are needed."""

    @staticmethod
    def forward(
        form: _Form,
        needs: tuple[bool, bool],
        grad_output: Tensor,
        grad_h_n: Tensor,
        saved: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        return _flat(
            torch.ops.mmixer_kernels.mcu_backward(
                *(grad_output, grad_h_n, *form.operands(tensors), saved),
                *(*form.options, form.recompute, *needs),
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.form, ctx.needs, grad_output, grad_h_n, _, *tensors = inputs
        ctx.save_for_backward(grad_output, grad_h_n, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        form, needs, tensors = ctx.form, ctx.needs, ctx.saved_tensors
        *tensors, lengths = tensors if form.has_lengths else (*tensors, None)

        def first(grad_output: Tensor, grad_h_n: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            operands = form.operands([*tensors, lengths] if form.has_lengths else tensors)
            inputs, contexts, weights, hx, _ = operands
            of_inputs, of_contexts, of_weights, of_hx = reference.backward(
                grad_output,
                grad_h_n,
                inputs,
                contexts,
                Weights.sets(weights, form.groups),
                hx,
                lengths,
                *(grad_output.new_empty(0), form.mix, form.eps, form.recompute, *needs),
            )
            tensors_of_weights = [tensor for group in of_weights for tensor in group.tensors()]
            return _flat((of_inputs, of_contexts, tensors_of_weights, of_hx))

        with arguments.without_autocast(tensors[0]):
            vjp = torch.func.vjp(first, *tensors)[1]
            grad_output, grad_h_n, *grads = vjp(cotangents)
        of_lengths = [None] if form.has_lengths else []
        return None, None, grad_output, grad_h_n, None, *grads, *of_lengths

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[Any],
        form: _Form,
        needs: tuple[bool, bool],
        grad_output: Tensor,
        grad_h_n: Tensor,
        saved: Tensor,
        *tensors: Tensor,
    ) -> tuple[Any, Any]:
        arguments = grad_output, grad_h_n, *form.operands(tensors), saved
        options = *form.options, form.recompute, *needs
        operand_dims = *in_dims[2:4], *form.operands(in_dims[5:])
        results, dims = batching.backward(
            forward, backward, info, operand_dims, *arguments, *options
        )
        return _flat(results), _flat(dims)


def _flat(gradients: Sequence[Any]) -> tuple[Any, ...]:
    """Of inputs, contexts and weights, which are lists, and of hx."""
    of_inputs, of_contexts, of_weights, of_hx = gradients
    return *of_inputs, *of_contexts, *of_weights, of_hx
