"""Plain calls, which nothing looks on at: straight to the engine, and back by one node of autograd.

Compilers, exporters, transforms, modes and profilers see a call through the dispatcher (`ops`),
which costs a small call several times its arithmetic. A native engine compares shapes and dtypes
itself, so that nothing is checked twice; a call that it refuses is given back to the caller, whose
checks say what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, derivatives, dispatch
from .engines import Engine, NativeEngine, chosen, native_of
from .problem import Call, Cotangents, Form, Keep, Layout, Need, Problem, Step, Weights

Options = tuple[str, bool, float, str, bool]
"""mix, batch_first, eps, engine and recompute of `functional.mcu`, not checked yet."""

_Results = tuple[Tensor, Tensor | None, Tensor | None]
"""Output, h_n, which a step has not, and what is left for backward."""


def sequence(
    input: Tensor,
    context: Tensor | None,
    sets: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """The results of `functional.mcu` for a batch; None where the call has to be looked at more
    closely."""
    if input.dim() != 3:
        return None
    contexts = [] if context is None else [context]
    own = _tensors(sets[0])
    if len(sets) == 1:
        return _sequences([input], contexts, own, hx, lengths, options, "sequence")
    operands = [input, input], contexts * 2, [*own, *_tensors(sets[1])], hx, lengths
    return _sequences(*operands, options, "concatenated", bidirectional=True)


def group(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor] | None,
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """The results of `functional.mcu_group`; None where the call has to be looked at more
    closely."""
    own = list(chain.from_iterable(map(_tensors, weights)))
    contexts = () if contexts is None else contexts
    return _sequences(inputs, contexts, own, hx, lengths, options, "group")


def step(step: Step, engine: str) -> Tensor | None:
    """The result of `functional.mcu_cell` for a batch; None where the call has to be looked at more
    closely."""
    input, context, weights, hx, mix, eps = step
    if input.dim() != 2:
        return None
    own = _tensors(weights)
    tensors = [input, *own] if context is None else [input, context, *own]
    if hx is not None:
        tensors.append(hx)
    form = Form(1, len(own), context is not None, hx is not None, False, mix, eps)
    results = _unchecked(form, tensors, (mix, False, eps, engine, False), "step")
    return None if results is None else results[0]


def run(
    problem: Problem, tensors: Sequence[Tensor], engine: Engine, keep: Keep
) -> tuple[Tensor, Tensor]:
    """A checked call of any engine, whose tensors `dispatch.plain` knows: output `[G, T, B, H]` and
    h_n `[G, B, H]`, with gradients where something is kept for them."""
    arguments.check_memory(problem, tensors)
    with torch.no_grad():
        results = engine.forward(problem, keep)
    call = Call(Form.of(problem.flat()), keep)
    recorded: tuple[Tensor, Tensor] = _recorded(_AnyEngine(engine), call, results, tensors)
    return recorded


def _sequences(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    layout: Layout,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """`_unchecked` of sequences."""
    tensors = [*inputs, *contexts, *weights]
    if hx is not None:
        tensors.append(hx)
    if lengths is not None:
        tensors.append(lengths)
    are_there = len(contexts) > 0, hx is not None, lengths is not None
    form = Form(len(inputs), len(weights), *are_there, options[0], options[2], bidirectional)
    results: tuple[Tensor, Tensor] | None = _unchecked(form, tensors, options, layout)
    return results


def _unchecked(form: Form, tensors: Sequence[Tensor], options: Options, layout: Layout) -> Any:
    """The results, or None."""
    kind = dispatch.plain(tensors)
    if kind is None or not kind.is_on_one_device:
        return None
    _, batch_first, _, name, recompute = options
    keep: Keep = "nothing"
    if kind.needs_gradient:
        keep = "states" if recompute else "gates"
        # A checkpoint compares what this call saves with what the ops may save, in their layout.
        if (layout == "step" or batch_first is True) and dispatch.saved_tensors_have_hooks():
            return None
    call = Call(form, keep, layout, batch_first)
    try:
        engine = native_of(chosen(name, tensors[0]))
        if engine is None:
            return None
        results = engine.run_forward(call, tensors)
    except (IndexError, TypeError, ValueError):
        return None
    return _recorded(engine, call, results, tensors)


def _tensors(weights: Weights) -> Sequence[Any]:
    """The fields of a set that is not checked yet, without those of the context, or the norms,
    where it has neither."""
    own: tuple[Any, ...] = weights
    if weights.weight_g is None and weights.weight_s is None:
        own = own[:1] + own[3:]
    return own[:-2] if weights.norm_weight is None and weights.norm_bias is None else own


def _recorded(
    engine: NativeEngine | _AnyEngine, call: Call, results: _Results, tensors: Sequence[Tensor]
) -> Any:
    """Output and h_n, with gradients where something is kept for them; None in h_n's place for a
    step."""
    return results[:2] if call.keep == "nothing" else _apply(engine, call, results, *tensors)


class _AnyEngine(NamedTuple):
    """An engine with a native one's backward, for checked calls in time-first layout."""

    engine: Engine

    @property
    def NAME(self) -> str:
        return self.engine.NAME

    def run_backward(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        saved: Tensor,
        cotangents: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        problem = Problem.of_flat(*call.form.fill(tensors))
        arguments.check_memory(problem, tensors)
        of_inputs, _, of_weights, *_ = call.form.fill(needs)
        need = Need(any(of_inputs), any(of_weights))
        grads = self.engine.backward(problem, saved, call.keep, Cotangents(*cotangents), need)
        return call.form.in_order(grads.flat())


class _Recurrence(Function):
    """A call as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, engine: NativeEngine | _AnyEngine, call: Call, results: _Results, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        output, h_n, saved = results
        ctx.engine, ctx.call = engine, call
        ctx.save_for_backward(saved, *tensors)
        ctx.set_materialize_grads(False)  # They would be as large as what is saved.
        return output, h_n

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        kept, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        given = [x for x in cotangents if x is not None]
        # A second derivative is the reference's.
        kind = None if torch.is_grad_enabled() else dispatch.plain([*given, *kept])
        if kind is not None and kind.is_on_one_device:
            saved, *tensors = kept
            try:
                grads = ctx.engine.run_backward(ctx.call, tensors, saved, cotangents, needs)
                return None, None, None, *grads
            except (TypeError, ValueError):  # What hooks give back may need the ops' conversions.
                problem = Problem.of_flat(*ctx.call.form.fill(tensors))
                arguments.check_memory(problem, tensors)
        if any(x.device != kept[0].device for x in (*given, *kept)):
            raise ValueError(
                "a hook of saved tensors must give each back on the device that it came from"
            )
        grads = _by_ops(ctx.engine.NAME, ctx.call, kept, needs, cotangents)
        return None, None, None, *grads


# `Function.apply` itself looks for the transforms of torch.func, of which there are none here.
_apply = super(Function, _Recurrence).apply


def _by_ops(
    engine: str,
    call: Call,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """`run_backward` by the ops."""
    grad_output, grad_h_n = cotangents
    groups, is_step = call.form.groups, call.layout == "step"
    saved, *tensors = kept
    if call.batch_first:
        tensors[:groups] = [x.transpose(0, 1) for x in tensors[:groups]]
        grad_output = None if grad_output is None else grad_output.transpose(-3, -2)
    if is_step:
        tensors[0] = tensors[0].unsqueeze(0)
        if call.form.has_hx:
            tensors[-1] = tensors[-1].unsqueeze(0)
    if grad_output is not None and call.layout == "concatenated":
        # What the vmap of torch.autograd knows; it has no unflatten.
        grad_output = torch.stack(grad_output.chunk(groups, -1))
    elif grad_output is not None and call.layout != "group":
        grad_output = grad_output[None, None] if is_step else grad_output[None]
    inputs, contexts, weights, hx = derivatives.of_forward(
        call.form,
        (engine, call.keep),
        (saved, *tensors),
        *derivatives.ops(),
        call.form.fill(needs)[:4],
        (grad_output, grad_h_n),
    )
    if call.batch_first:
        inputs = [None if x is None else x.transpose(0, 1) for x in inputs]
    if is_step:
        inputs = [None if x is None else x.squeeze(0) for x in inputs]
        hx = None if hx is None else hx.squeeze(0)
    return call.form.in_order((inputs, contexts, weights, hx))
