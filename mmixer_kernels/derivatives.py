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

from . import autocast, batching, dispatch
from .engines import reference
from .problem import Cotangents, Form, Keep, Need, Problem

_FLAT = len(Problem._fields)


def tensors_of(flat: Sequence[Any]) -> list[Tensor]:
    """All tensors that there are of a call in the fields of `Problem.flat`."""
    inputs, contexts, weights, hx, lengths = flat[:5]
    return [*inputs, *contexts, *weights, *(x for x in (hx, lengths) if x is not None)]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mcu_forward`."""
    flat, options = arguments[:_FLAT], arguments[_FLAT:]
    result: tuple[Tensor, Tensor, Tensor] = _Forward.apply(
        Form.of(flat), options, *tensors_of(flat)
    )
    return result


def backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`mcu_backward`."""
    first, flat, options = arguments[:3], arguments[3 : 3 + _FLAT], arguments[3 + _FLAT :]
    form, need = Form.of(flat), Need(*options[2:])
    *grads, grad_hx = _Backward.apply(form, options, *first, *tensors_of(flat))
    of_inputs = form.groups if need.input else 0
    of_contexts = of_inputs + form.contexts
    return grads[:of_inputs], grads[of_inputs:of_contexts], grads[of_contexts:], grad_hx


def remember(ctx: Any, form: Form, options: Sequence[Any], *tensors: Tensor) -> None:
    """Keeps a call for its derivative.

    Args:
        options: the op's arguments after the problem's.
        tensors: what else is kept, then the problem's.
    """
    ctx.form, ctx.options = form, options
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # They would be as large as what is saved.


def ops() -> tuple[Any, Any]:
    """`mcu_forward` and `mcu_backward` as the dispatcher has them."""
    return torch.ops.mmixer_kernels.mcu_forward, torch.ops.mmixer_kernels.mcu_backward


def of_forward(
    form: Form,
    options: tuple[str, Keep],
    kept: Sequence[Tensor],
    run_forward: Callable[..., Any],
    run_backward: Callable[..., Any],
    needs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
) -> list[Any]:
    """`mcu_forward`'s gradients of inputs, contexts, weights and hx, with None for each that is
    not needed.

    Args:
        options: engine and keep.
        kept: the forward's `saved`, then the problem's tensors.
        run_forward, run_backward: the ops, or what has their arguments.
        needs: for each tensor whether its gradient is needed, nested as the ops' arguments.
        cotangents: those of output and h_n, None for zeros.
    """
    saved, *tensors = kept
    flat = form.fill(tensors)
    filled = Cotangents(*cotangents).filled(Problem.of_flat(*flat))
    engine, keep = options
    if keep == "nothing":  # The call was traced without gradients, say, and is then trained.
        keep = "gates"
        with torch.no_grad():
            saved = run_forward(*flat, engine, keep)[2]
    *of_lists, of_hx = needs
    need_input, need_context, need_weights = map(any, of_lists)
    *grads, grad_hx = run_backward(*filled, saved, *flat, engine, keep, need_input, need_weights)
    lists = zip(grads, of_lists, (need_input, need_context, need_weights), strict=True)
    return [
        *(each if is_needed else [None] * len(of) for each, of, is_needed in lists),
        grad_hx if of_hx else None,
    ]


def of_backward(
    ctx: Any, vjp: Callable[..., Any], cotangents: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """`mcu_backward`'s gradients of grad_output, grad_h_n and the problem's tensors: the derivative
    of the reference's backward, which was derived by hand.

    Args:
        vjp: `torch.func.vjp`, or what has its arguments and results.
        cotangents: those of the gradients that `flat` gives, None for zeros.
    """
    form, tensors = ctx.form, list(ctx.saved_tensors)
    of_lengths = [None] if form.has_lengths else []
    lengths = [tensors.pop() for _ in of_lengths]
    given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    if not given:
        return (*(None for _ in tensors), *of_lengths)

    def first(grad_output: Tensor, grad_h_n: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = Problem.of_flat(*form.fill([*tensors, *lengths]))
        first_cotangents, need = Cotangents(grad_output, grad_h_n), Need(*ctx.options[2:])
        saved = grad_output.new_empty(0)
        gradients = reference.backward(problem, saved, "nothing", first_cotangents, need)
        values = flat(gradients.flat())
        return tuple(values[i] for i in given)

    with autocast.off(tensors[0]):
        second = vjp(first, *tensors)[1](tuple(cotangents[i] for i in given))
    return (*second, *of_lengths)


def vjp(function: Callable[..., Any], *tensors: Tensor) -> tuple[Any, ...]:
    """`torch.func.vjp` for a node of autograd's graph, which may have hooks of saved tensors, as
    checkpoints and offloading do: torch.func refuses them."""
    if dispatch.is_batched():  # `requires_grad_` is refused there.
        return torch.func.vjp(function, *tensors)
    with torch.enable_grad():
        # Aliases, since one operand may have been computed from another: wanted are the partial
        # derivatives, still connected to the operands for a third derivative.
        aliases = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors
        ]
        results = function(*aliases)

    def pull_back(cotangents: Any) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        return torch.autograd.grad(
            results, aliases, cotangents, create_graph=create_graph, allow_unused=True
        )

    return results, pull_back


def flat(gradients: Sequence[Any]) -> tuple[Any, ...]:
    """The gradients of inputs, contexts and weights, which are lists, and of hx, as one tuple."""
    of_inputs, of_contexts, of_weights, of_hx = gradients
    return *of_inputs, *of_contexts, *of_weights, of_hx


class _Forward(Function):
    """`mcu_forward` of tensors; form and options are those of `remember`."""

    @staticmethod
    def forward(form: Form, options: Any, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.mmixer_kernels.mcu_forward(
            *form.fill(tensors), *options
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        form, options, *tensors = inputs
        remember(ctx, form, options, output[2], *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.form.fill(ctx.needs_input_grad[2:])[:4]
        kept, both = ctx.saved_tensors, (forward, backward)
        grads = flat(of_forward(ctx.form, ctx.options, kept, *both, needs, cotangents[:2]))
        of_hx = grads[-1:] if ctx.form.has_hx else ()
        of_lengths = [None] if ctx.form.has_lengths else []
        return None, None, *grads[:-1], *of_hx, *of_lengths

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], form: Form, options: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        arguments = *form.fill(tensors), *options
        return batching.forward(forward, info, form.fill(in_dims[2:]), *arguments)


class _Backward(Function):
    """`mcu_backward` of tensors, its gradients as one tuple, of inputs and weights as needed."""

    @staticmethod
    def forward(form: Form, options: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = *tensors[:3], *form.fill(tensors[3:]), *options
        return flat(torch.ops.mmixer_kernels.mcu_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        form, options, grad_output, grad_h_n, _, *tensors = inputs
        remember(ctx, form, options, grad_output, grad_h_n, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_output, grad_h_n, *grads = of_backward(ctx, torch.func.vjp, cotangents)
        return None, None, grad_output, grad_h_n, None, *grads

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], form: Form, options: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        dims = *in_dims[2:5], *form.fill(in_dims[5:])
        arguments = *tensors[:3], *form.fill(tensors[3:]), *options
        results, result_dims = batching.backward(forward, backward, info, dims, *arguments)
        return flat(results), flat(result_dims)
