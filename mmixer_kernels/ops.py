"""The recurrence as dispatcher ops: schema, fake, autograd and the batch rules.

Compilers, exporters, transforms, modes and profilers see a call through them; others go by `plain`.
`mmixer_kernels::mcu_forward` and `mcu_backward` take G weight sets in a call. Here alone a call is
flat, as op schemas know no values of several fields. A second derivative differentiates the
reference. Tools that have no rule for an op get the reference's equations.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import arguments, autocast, batching, derivatives, dispatch, flops, plain, reference
from .engines import Engine, get
from .problem import Cotangents, Keep, Need, Problem, Step

_PROBLEM = (  # Problem.flat, in words
    "Tensor[] inputs, Tensor[] contexts, Tensor[] weights, Tensor? hx, Tensor? lengths, "
    "str mix, float eps, bool bidirectional"
)
_library = torch.library.Library("mmixer_kernels", "DEF")
_library.define(
    f"mcu_forward({_PROBLEM}, str engine, str keep) -> (Tensor output, Tensor h_n, Tensor saved)"
)
_library.define(
    f"mcu_backward(Tensor grad_output, Tensor grad_h_n, Tensor saved, {_PROBLEM}, str engine, "
    "str keep, bool need_input, bool need_weights) "
    "-> (Tensor[] grad_inputs, Tensor[] grad_contexts, Tensor[] grad_weights, Tensor grad_hx)"
)

_Gradients = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]
_FLAT = len(Problem._fields)


def run(problem: Problem, engine: str, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """A call of an engine, with gradients.

    Args:
        engine: a name that `engines.choose` returned.
        recompute: save only the states for backward, which computes the rest again.

    Returns:
        output `[G, T, B, H]` and h_n `[G, B, H]`.
    """
    tensors = problem.tensors()
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    keep: Keep = "states" if recompute else "gates"
    if dispatch.is_plain(tensors):
        kept: Keep = keep if needs_gradient else "nothing"
        return plain.run(problem, tensors, _engine(engine, problem), kept)
    if dispatch.needs_equations(torch.compiler.is_compiling()):
        return _by_equations(problem)
    if torch.jit.is_tracing():  # What is traced without gradients may be trained.
        needs_gradient = any(tensor.requires_grad for tensor in tensors)
    elif dispatch.is_batched():  # Whether it does shows below the batch, where its rule looks.
        needs_gradient = True
    if not needs_gradient:
        keep = "nothing"
    if dispatch.is_differentiated_by_functorch():
        return derivatives.forward(*problem.flat(), engine, keep)[:2]
    if dispatch.a_mode_looks_on():
        flops.tell_counters()
    output, h_n, _ = torch.ops.mmixer_kernels.mcu_forward(*problem.flat(), engine, keep)
    return output, h_n


def run_step(step: Step, engine: str) -> Tensor:
    """The state `[B, H]` after one step of one weight set."""
    engine_step = getattr(get(engine), "step", None)
    if engine_step is not None and step.input.shape[0]:
        tensors = step.tensors()
        kind = dispatch.plain(tensors)
        if kind is not None and not kind.needs_gradient:
            arguments.check_memory(step, tensors)
            next_state: Tensor = engine_step(step)
            return next_state
    return run(step.problem(), engine)[1].squeeze(0)


def _by_equations(problem: Problem) -> tuple[Tensor, Tensor]:
    """`run` in ordinary operations, which any tool can follow."""
    with autocast.off(problem.inputs[0]):
        return reference.mcu_group(problem, layer_norm=reference.layer_norm)


def _engine(name: str, problem: Problem) -> Engine:
    """The engine; without any sample the reference, as there is nothing to compute."""
    return get(name if problem.inputs[0].shape[1] else "reference")


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, (engine, keep) = Problem.of_flat(*args[:_FLAT]), args[_FLAT:]
    arguments.check_memory(problem, problem.tensors())
    with autocast.off(problem.inputs[0]):
        output, h_n, saved = _engine(engine, problem).forward(problem, keep)
    if saved is None:
        saved = output.new_empty(0, dtype=problem.compute_dtype)
    return output, h_n, saved


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, (engine, keep) = Problem.of_flat(*args[:_FLAT]), args[_FLAT:]
    groups, steps, batch, hidden = problem.sizes
    new_empty = problem.inputs[0].new_empty
    return (
        new_empty(groups, steps, batch, hidden),
        new_empty(groups, batch, hidden),
        new_empty(get(engine).saved_size(problem, keep), dtype=problem.compute_dtype),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    flat, options = inputs[:_FLAT], inputs[_FLAT:]
    tensors = derivatives.tensors_of(flat)
    derivatives.remember(ctx, derivatives.Form.of(flat), options, output[2], *tensors)


def _forward_autograd(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    if dispatch.a_mode_looks_on():
        flops.tell_counters()
    needs = ctx.needs_input_grad[:4]
    form, options, kept = ctx.form, ctx.options, ctx.saved_tensors
    grads = derivatives.of_forward(form, options, kept, *_both, needs, cotangents[:2])
    return *grads, *[None] * 6


def _backward(*args: Any) -> _Gradients:
    grad_output, grad_h_n, saved, *rest = args
    problem, (engine, keep, *need) = Problem.of_flat(*rest[:_FLAT]), rest[_FLAT:]
    arguments.check_memory(problem, problem.tensors())
    cotangents = Cotangents(grad_output, grad_h_n)
    with autocast.off(problem.inputs[0]):
        gradients = _engine(engine, problem).backward(problem, saved, keep, cotangents, Need(*need))
    return gradients.flat()


def _backward_fake(*args: Any) -> _Gradients:
    _, grad_h_n, _, inputs, contexts, weights, *_, need_input, need_weights = args

    def fresh(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in tensors]

    return (
        fresh(inputs) if need_input else [],
        fresh(contexts),
        fresh(weights) if need_weights else [],
        grad_h_n.new_empty(grad_h_n.shape),
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    grad_output, grad_h_n, _, *rest = inputs
    flat, options = rest[:_FLAT], rest[_FLAT:]
    tensors = grad_output, grad_h_n, *derivatives.tensors_of(flat)
    derivatives.remember(ctx, derivatives.Form.of(flat), options, *tensors)


def _backward_autograd(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
    flat = derivatives.flat(cotangents)
    grad_output, grad_h_n, *grads = derivatives.of_backward(ctx, derivatives.vjp, flat)
    return grad_output, grad_h_n, None, *ctx.form.fill(grads)[:5], *[None] * 7


for _name, _implementation, _fake, _setup, _autograd in (
    ("mcu_forward", _forward, _forward_fake, _forward_setup, _forward_autograd),
    ("mcu_backward", _backward, _backward_fake, _backward_setup, _backward_autograd),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _qualified_name = f"mmixer_kernels::{_name}"
    torch.library.register_fake(_qualified_name, _fake, lib=_library)
    torch.library.register_autograd(_qualified_name, _autograd, setup_context=_setup, lib=_library)

_both = derivatives.ops()
for _qualified_name, _rule in (
    ("mmixer_kernels::mcu_forward", partial(batching.forward, _both[0])),
    ("mmixer_kernels::mcu_backward", partial(batching.backward, *_both)),
):
    torch.library.register_vmap(_qualified_name, _rule, lib=_library)
with suppress(RuntimeError):  # Some day torch will not have this key.
    _library.impl(
        "mcu_backward", partial(batching.backward_of_batched_gradients, *_both), "Batched"
    )
