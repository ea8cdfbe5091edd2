"""The derivatives of the ops: once for PyTorch's autograd, which `ops` registers them with, and
for those of `torch.func`, which follow functions of tensors, not of lists.

`torch.func.grad`, `vjp` and `jacrev`, and `vmap` around and inside them, run the fused forward and
backward. The second derivative is the reference's, of ordinary operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import autocast, batching
from .engines import reference
from .problem import Cotangents, Need, Problem

_FLAT = len(Problem._fields)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mcu_forward`."""
    problem = Problem.of_flat(*arguments[:_FLAT])
    result: tuple[Tensor, Tensor, Tensor] = _Forward.apply(
        problem.positions(), arguments[_FLAT:], *problem.tensors()
    )
    return result


def backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`mcu_backward`."""
    problem = Problem.of_flat(*arguments[3 : 3 + _FLAT])
    options = arguments[3 + _FLAT :]
    *grads, grad_hx = _Backward.apply(
        problem.positions(), options, *arguments[:3], *problem.tensors()
    )
    need = Need(*options[2:])
    first = len(problem.inputs) if need.input else 0
    second = first + len(problem.contexts)
    return grads[:first], grads[first:second], grads[second:], grad_hx


def remember(ctx: Any, form: Problem, options: Sequence[Any], *tensors: Tensor | None) -> None:
    """Keeps a call for its derivative.

    Args:
        form: `Problem.positions` of the call.
        options: the op's arguments after the problem's.
        tensors: what else is kept, then the problem's.
    """
    ctx.form, ctx.options = form, tuple(options)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # They would be as large as what is saved.


def of_forward(
    ctx: Any,
    run_forward: Callable[..., Any],
    run_backward: Callable[..., Any],
    needs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
) -> list[Any]:
    """`mcu_forward`'s gradients of inputs, contexts, weights and hx, with None for each that is
    not needed.

    Args:
        run_forward, run_backward: the ops, or what has their arguments.
        needs: for each tensor whether its gradient is needed, nested as the ops' arguments.
        cotangents: those of output and h_n, None for zeros.
    """
    saved, *tensors = ctx.saved_tensors
    problem = ctx.form.map(tensors.__getitem__)
    groups, steps, batch, hidden = problem.sizes
    grad_output, grad_h_n = cotangents
    if grad_output is None:
        grad_output = problem.inputs[0].new_zeros(()).expand(groups, steps, batch, hidden)
    if grad_h_n is None:
        grad_h_n = problem.inputs[0].new_zeros(()).expand(groups, batch, hidden)
    engine, keep = ctx.options
    if keep == "nothing":  # The call was traced without gradients, say, and is then trained.
        keep = "gates"
        with torch.no_grad():
            saved = run_forward(*problem.flat(), engine, keep)[2]
    of_inputs, of_contexts, of_weights, of_hx = needs
    need = Need(any(of_inputs), any(of_weights))
    gradients = run_backward(
        grad_output, grad_h_n, saved, *problem.flat(), engine, keep, need.input, need.weights
    )
    needed = need.input, any(of_contexts), need.weights
    lists = [
        grads if is_needed else [None] * len(of)
        for grads, is_needed, of in zip(
            gradients, needed, (of_inputs, of_contexts, of_weights), strict=False
        )
    ]
    return [*lists, gradients[3] if of_hx else None]


def of_backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """`mcu_backward`'s gradients of grad_output, grad_h_n, inputs, contexts, weights and hx: the
    derivative of the reference's backward, which was derived by hand.

    Args:
        cotangents: those of the gradients that `flat` gives, None for zeros.
    """
    form, tensors = ctx.form, list(ctx.saved_tensors)
    need = Need(*ctx.options[2:])
    lengths = None if form.lengths is None else tensors.pop()
    given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    if not given:
        return (None,) * len(tensors)

    def first(grad_output: Tensor, grad_h_n: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = form.map([*tensors, lengths].__getitem__)
        saved = grad_output.new_empty(0)
        cotangents = Cotangents(grad_output, grad_h_n)
        gradients = reference.backward(problem, saved, "nothing", cotangents, need)
        values = flat(gradients.flat())
        return tuple(values[i] for i in given)

    with autocast.off(tensors[0]):
        second = torch.func.vjp(first, *tensors)[1](tuple(cotangents[i] for i in given))
    return second


def flat(gradients: Sequence[Any]) -> tuple[Any, ...]:
    """The gradients of inputs, contexts and weights, which are lists, and of hx, as one tuple."""
    of_inputs, of_contexts, of_weights, of_hx = gradients
    return *of_inputs, *of_contexts, *of_weights, of_hx


def nested(form: Problem, values: Sequence[Any]) -> list[Any]:
    """A value per tensor, nested as the ops' arguments: inputs, contexts, weights, hx, lengths."""
    *lists, hx, lengths = form.flat()[:5]
    return [
        *([values[i] for i in positions] for positions in lists),
        *(None if i is None else values[i] for i in (hx, lengths)),
    ]


class _Forward(Function):
    """`mcu_forward` of tensors; form and options are those of `remember`."""

    @staticmethod
    def forward(form: Problem, options: Any, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.mmixer_kernels.mcu_forward(
            *form.map(tensors.__getitem__).flat(), *options
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        form, options, *tensors = inputs
        remember(ctx, form, options, output[2], *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = nested(ctx.form, ctx.needs_input_grad[2:])
        grads = of_forward(ctx, forward, backward, needs[:4], cotangents[:2])
        grads_of_tensors = flat(grads)
        if ctx.form.hx is None:
            grads_of_tensors = grads_of_tensors[:-1]
        of_lengths = [] if ctx.form.lengths is None else [None]
        return None, None, *grads_of_tensors, *of_lengths

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], form: Problem, options: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        dims = nested(form, in_dims[2:])
        arguments = *form.map(tensors.__getitem__).flat(), *options
        return batching.forward(forward, info, dims, *arguments)


class _Backward(Function):
    """`mcu_backward` of tensors, its gradients as one tuple, of inputs and weights as needed."""

    @staticmethod
    def forward(form: Problem, options: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = form.map(tensors[3:].__getitem__)
        return flat(torch.ops.mmixer_kernels.mcu_backward(*tensors[:3], *problem.flat(), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        form, options, grad_output, grad_h_n, _, *tensors = inputs
        remember(ctx, form, options, grad_output, grad_h_n, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_output, grad_h_n, *grads = of_backward(ctx, cotangents)
        of_lengths = [] if ctx.form.lengths is None else [None]
        return None, None, grad_output, grad_h_n, None, *grads, *of_lengths

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], form: Problem, options: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        dims = *in_dims[2:5], *nested(form, in_dims[5:])
        arguments = *tensors[:3], *form.map(tensors[3:].__getitem__).flat(), *options
        results, result_dims = batching.backward(forward, backward, info, dims, *arguments)
        return flat(results), flat(result_dims)
