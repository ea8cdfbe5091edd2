"""Plain calls, which nothing looks on at: straight to the engine, and back by one node of autograd.

Compilers, exporters, transforms and profilers see a call through the dispatcher (`ops`), which
costs a small call several times its arithmetic. An engine with `CHECKS` compares shapes and dtypes
itself, so that nothing is checked twice; a call that it refuses is given back to the caller, whose
checks say what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, derivatives, dispatch
from .derivatives import Form
from .engines import Engine, choose, get
from .problem import Cotangents, Keep, Need, Problem, Step, Weights


class Options(NamedTuple):
    """The options of `functional.mcu` and `mcu_group`, not checked yet."""

    mix: str
    batch_first: bool
    eps: float
    engine: str
    recompute: bool


def sequence(
    input: Tensor,
    context: Tensor,
    weights: Weights,
    hx: Tensor | None,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """`functional.mcu` of a batch; None where the call has to be looked at more closely."""
    if input.dim() != 3:
        return None
    own = _tensors(weights)
    form = Form(1, len(own), hx is not None, lengths is not None, options.mix, options.eps)
    tensors = [input, context, *own, *_given(hx, lengths)]
    return _unchecked(form, tensors, options, is_sequence=True)


def group(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """`functional.mcu_group`; None where the call has to be looked at more closely."""
    own = [tensor for weight_set in weights for tensor in _tensors(weight_set)]
    has_hx, has_lengths = hx is not None, lengths is not None
    form = Form(len(inputs), len(own), has_hx, has_lengths, options.mix, options.eps)
    tensors = [*inputs, *contexts, *own, *_given(hx, lengths)]
    return _unchecked(form, tensors, options, is_sequence=False)


def step(step: Step, engine: str) -> Tensor | None:
    """`functional.mcu_cell` of a batch without gradients; None where the call has to be looked at
    more closely."""
    tensors = [step.input, step.context, *_tensors(step.weights), *_given(step.hx)]
    kind = dispatch.plain(tensors)
    if kind is None or kind.needs_gradient or not kind.is_on_one_device:
        return None
    try:
        chosen = get(choose(engine, step.input))
        if not chosen.CHECKS:
            return None
        arguments.check_memory(step, tensors)
        next_state: Tensor = chosen.step(step)  # type: ignore[attr-defined]
    except (IndexError, TypeError, ValueError):  # The first is of weights without dimensions.
        return None
    return next_state


def run(
    problem: Problem, tensors: Sequence[Tensor], engine: Engine, keep: Keep
) -> tuple[Tensor, Tensor]:
    """A checked call of any engine, whose tensors `dispatch.plain` knows: output `[G, T, B, H]` and
    h_n `[G, B, H]`, with gradients where something is kept for them."""
    call = _Call(engine, keep, Form.of(problem.flat()), batch_first=False, is_sequence=False)
    return call.run(tensors)


def _unchecked(
    form: Form, tensors: Sequence[Tensor], options: Options, is_sequence: bool
) -> tuple[Tensor, Tensor] | None:
    _, batch_first, _, name, recompute = options
    kind = dispatch.plain(tensors)
    if kind is None or not kind.is_on_one_device:
        return None
    if batch_first is not False and batch_first is not True:
        return None
    keep: Keep = "nothing"
    if kind.needs_gradient:
        keep = "states" if recompute else "gates"
    try:
        engine = get(choose(name, tensors[0]))
        if not engine.CHECKS:
            return None
        return _Call(engine, keep, form, batch_first, is_sequence).run(tensors)
    except (TypeError, ValueError):
        return None


def _tensors(weights: Weights) -> Sequence[Any]:
    """The fields of a set that is not checked yet, without norms where it has neither."""
    *_, norm_weight, norm_bias = weights
    return weights[:-2] if norm_weight is None and norm_bias is None else weights


def _given(*optional: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in optional if tensor is not None]


class _Call(NamedTuple):
    """A call without its tensors, which are those of `Problem.tensors` in the caller's
    layout."""

    engine: Engine
    keep: Keep
    form: Form
    batch_first: bool
    is_sequence: bool  # of one weight set, without its dimension

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Output and h_n."""
        if self.keep == "nothing":
            return self.forward(tensors)[:2]
        results: tuple[Tensor, Tensor] = _apply(self, *tensors)
        return results

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, h_n, and what is left for `backward`."""
        problem = self._problem(tensors)
        arguments.check_memory(problem, tensors)
        output, h_n, saved = self.engine.forward(problem, self.keep)
        # In place, so that the results are no views, which autograd would have to follow.
        if self.is_sequence:
            output.squeeze_(0)
        if self.batch_first:
            output.transpose_(-3, -2)
        return output, h_n, saved

    def backward(
        self,
        saved: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        """The gradients of the tensors, in their order.

        Args:
            needs: for each tensor whether its gradient is needed.
            cotangents: those of output and h_n, None for zeros.
        """
        given = [x for x in cotangents if x is not None]
        if torch.is_grad_enabled() or not dispatch.is_plain([*given, saved, *tensors]):
            return self._backward_by_ops(saved, tensors, needs, cotangents)
        problem = self._problem(tensors)
        arguments.check_memory(problem, tensors)
        grad_output, grad_h_n = cotangents
        if self.batch_first and grad_output is not None:
            grad_output = grad_output.transpose(-3, -2)
        groups, end = self.form.groups, 2 * self.form.groups + self.form.weights
        need = Need(True in needs[:groups], True in needs[2 * groups : end])
        gradients = self.engine.backward(
            problem, saved, self.keep, Cotangents(grad_output, grad_h_n), need
        )
        inputs: Sequence[Tensor | None] = gradients.inputs
        if self.batch_first:
            inputs = [x.transpose(0, 1) for x in gradients.inputs]
        weights: Sequence[Tensor | None] = Weights.flat(gradients.weights)
        return self._in_order(
            inputs or [None] * groups,
            gradients.contexts,
            weights or [None] * self.form.weights,
            gradients.hx,
        )

    def _backward_by_ops(
        self,
        saved: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        """`backward` where something looks on, or for a second derivative."""
        grad_output, grad_h_n = cotangents
        groups = self.form.groups
        if self.batch_first:
            tensors = [x.transpose(0, 1) for x in tensors[:groups]] + list(tensors[groups:])
            grad_output = None if grad_output is None else grad_output.transpose(-3, -2)
        if self.is_sequence and grad_output is not None:
            grad_output = grad_output.unsqueeze(0)
        forward, backward = derivatives.ops()
        inputs, *rest = derivatives.of_forward(
            self.form,
            (self.engine.NAME, self.keep),
            (saved, *tensors),
            forward,
            backward,
            self.form.fill(needs)[:4],
            (grad_output, grad_h_n),
        )
        if self.batch_first:
            inputs = [None if x is None else x.transpose(0, 1) for x in inputs]
        return self._in_order(inputs, *rest)

    def _problem(self, tensors: Sequence[Tensor]) -> Problem:
        inputs, *rest = self.form.fill(tensors)
        if self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        return Problem.of_flat(inputs, *rest)

    def _in_order(
        self,
        inputs: Sequence[Tensor | None],
        contexts: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        hx: Tensor | None,
    ) -> Sequence[Tensor | None]:
        of_hx = [hx] if self.form.has_hx else []
        of_lengths = [None] if self.form.has_lengths else []
        return *inputs, *contexts, *weights, *of_hx, *of_lengths


class _Recurrence(Function):
    """A call as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n, saved = call.forward(tensors)
        ctx.call = call
        ctx.save_for_backward(saved, *tensors)
        ctx.set_materialize_grads(False)  # They would be as large as what is saved.
        return output, h_n

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        saved, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        return None, *ctx.call.backward(saved, tensors, needs, cotangents)


# `Function.apply` itself looks for the transforms of torch.func, of which there are none here.
_apply = super(Function, _Recurrence).apply
