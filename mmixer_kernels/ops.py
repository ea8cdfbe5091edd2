"""The recurrence as dispatcher ops: schema, fake, autograd and autocast.

`mmixer_kernels::mcu_forward` and `mcu_backward` take G weight sets in a call. A second derivative
differentiates the reference. Tools that have no rule for an op get the reference's equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import arguments, batching, derivatives, dispatch, flops, reference
from .engines import get
from .reference import Weights, compute_dtype

_OPERANDS = "Tensor[] inputs, Tensor[] contexts, Tensor[] weights, Tensor? hx, Tensor? lengths"
_library = torch.library.Library("mmixer_kernels", "DEF")
_library.define(
    f"mcu_forward({_OPERANDS}, str mix, float eps, str engine, bool save, bool recompute) "
    "-> (Tensor output, Tensor h_n, Tensor saved)"
)
_library.define(
    f"mcu_backward(Tensor grad_output, Tensor grad_h_n, {_OPERANDS}, Tensor saved, str mix, "
    "float eps, str engine, bool recompute, bool need_input, bool need_weights) "
    "-> (Tensor[] grad_inputs, Tensor[] grad_contexts, Tensor[] grad_weights, Tensor grad_hx)"
)

_Backward = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]
_LARGEST_OFFSET = 2**40  # bytes of a view into its storage; addresses below are looked at closely


def mcu(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    *,
    mix: str,
    eps: float,
    engine: str,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """G weight sets over their sequences in one call of an engine.

    Args:
        inputs: G tensors `[T, B, input_size]`; the input sizes may differ.
        contexts: G tensors `[B, context_size]`; likewise.
        weights: G weight sets of one hidden size.
        hx: `[G, B, H]` or None.
        lengths: `[B]` or None.
        engine: a name that `engines.choose` returned.
        recompute: save only the states for backward, which computes the rest again.

    Returns:
        output `[G, T, B, H]` and h_n `[G, B, H]`.
    """
    flat = [tensor for group in weights for tensor in group.tensors()]
    tensors = [*inputs, *contexts, *flat, *_given(hx, lengths)]
    save = _needs_gradient(tensors)
    if not save and dispatch.is_plain(tensors):
        _check_memory(tensors, inputs, contexts, weights, hx, lengths)
        output, h_n, _ = _engine(engine, inputs).forward(
            inputs, contexts, weights, hx, lengths, mix, eps, save=False
        )
        return output, h_n
    if dispatch.needs_equations(torch.compiler.is_compiling()):
        return _by_equations(inputs, contexts, weights, hx, lengths, mix, eps)
    if dispatch.is_differentiated_by_functorch():
        operands = inputs, contexts, flat, hx, lengths
        return derivatives.forward(*operands, mix, eps, engine, save, recompute)[:2]
    if torch.jit.is_tracing():  # What is traced without gradients may be trained.
        save = any(tensor.requires_grad for tensor in tensors)
    if dispatch.a_mode_looks_on():
        flops.tell_counters()
    output, h_n, _ = torch.ops.mmixer_kernels.mcu_forward(
        list(inputs), list(contexts), flat, hx, lengths, mix, eps, engine, save, recompute
    )
    return output, h_n


def mcu_cell(
    input: Tensor,
    context: Tensor,
    weights: Weights,
    hx: Tensor | None,
    *,
    mix: str,
    eps: float,
    engine: str,
) -> Tensor:
    """One step of one weight set: input `[B, input_size]`, context `[B, context_size]`, hx and
    the next state `[B, H]`."""
    step = getattr(get(engine), "step", None)
    if step is not None and input.shape[0]:
        tensors = [input, context, *weights.tensors(), *([] if hx is None else [hx])]
        if not _needs_gradient(tensors) and dispatch.is_plain(tensors):
            _check_memory(tensors, [input], [context], [weights], hx, None)
            next_state: Tensor = step(input, context, weights, hx, mix, eps)
            return next_state
    state = None if hx is None else hx.unsqueeze(0)
    operands = [input.unsqueeze(0)], [context], [weights], state, None
    return mcu(*operands, mix=mix, eps=eps, engine=engine, recompute=False)[1].squeeze(0)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _by_equations(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`mcu` in ordinary operations, which any tool can follow."""
    with arguments.without_autocast(inputs[0]):
        return reference.mcu_group(
            *(inputs, contexts, weights, hx, lengths),
            mix=mix,
            eps=eps,
            layer_norm=reference.layer_norm,
        )


def autocast(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    states: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Weights], Sequence[Tensor | None]]:
    """Inside `torch.autocast`, all but float64 in autocast's dtype, as for a matrix product."""
    device_type = inputs[0].device.type
    if not arguments.autocast_enabled(device_type):
        return inputs, contexts, weights, states
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor  # None, or what `arguments.check` will name
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return (
        [cast(tensor) for tensor in inputs],
        [cast(tensor) for tensor in contexts],
        [group.map(cast) for group in weights],
        [cast(tensor) for tensor in states],
    )


def _engine(name: str, inputs: Sequence[Tensor]) -> ModuleType:
    """The engine; without any sample the reference, as there is nothing to compute."""
    return get(name if inputs[0].shape[1] else "reference")


def _check_memory(
    tensors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """ValueError where the storage of one of the tensors, which are those of the others, was freed:
    a kernel would not survive it. TypeError where one is sparse, and has none."""
    with suppress(RuntimeError):  # of a tensor without storage
        # The address of a view of a freed storage is the view's offset in bytes.
        if min(map(Tensor.data_ptr, tensors)) > _LARGEST_OFFSET:
            return
    _check_each(arguments.check_tensor, inputs, contexts, weights, hx, lengths)
    _check_each(arguments.check_memory, inputs, contexts, weights, hx, lengths)


def _check_each(
    check: Callable[[str, Tensor], object],
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Each operand under the name that the caller knows it by."""
    for i, (input, context, group) in enumerate(zip(inputs, contexts, weights, strict=True)):
        operands = {"input": input, "context": context, "hx": hx, "lengths": lengths}
        operands |= group._asdict()
        for name, tensor in operands.items():
            if tensor is not None:
                check(arguments.name_of(name, i if len(inputs) > 1 else None), tensor)


def _forward(
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
    sets = Weights.sets(weights, len(inputs))
    tensors = [*inputs, *contexts, *weights, *_given(hx, lengths)]
    _check_memory(tensors, inputs, contexts, sets, hx, lengths)
    with arguments.without_autocast(inputs[0]):
        return _engine(engine, inputs).forward(
            inputs, contexts, sets, hx, lengths, mix, eps, save, recompute
        )


def _forward_fake(
    inputs: list[Tensor],
    contexts: list[Tensor],
    weights: list[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
    engine: str,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = inputs[0].shape
    hidden = Weights.sets(weights, len(inputs))[0].hidden_size
    size = get(engine).saved_size(inputs, hidden, recompute) if save else 0
    return (
        inputs[0].new_empty(len(inputs), steps, batch, hidden),
        inputs[0].new_empty(len(inputs), batch, hidden),
        inputs[0].new_empty(size, dtype=compute_dtype(inputs[0].dtype)),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sequences, contexts, weights, hx, lengths, mix, eps, engine, save, recompute = inputs
    ctx.groups, ctx.weights = len(sequences), len(weights)
    ctx.has_hx, ctx.has_lengths = hx is not None, lengths is not None
    ctx.options = mix, eps, engine, save, recompute
    ctx.set_materialize_grads(False)
    optional = [tensor for tensor in (hx, lengths) if tensor is not None]
    ctx.save_for_backward(output[2], *sequences, *contexts, *weights, *optional)


def _forward_autograd(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    saved, *rest = ctx.saved_tensors
    mix, eps, engine, save, recompute = ctx.options
    groups = ctx.groups
    inputs, contexts, rest = rest[:groups], rest[groups : 2 * groups], rest[2 * groups :]
    weights, rest = rest[: ctx.weights], rest[ctx.weights :]
    hx = rest[0] if ctx.has_hx else None
    lengths = rest[-1] if ctx.has_lengths else None
    steps, batch, _ = inputs[0].shape
    hidden = weights[3].shape[0]
    if grad_output is None:
        grad_output = inputs[0].new_zeros(()).expand(groups, steps, batch, hidden)
    if grad_h_n is None:
        grad_h_n = inputs[0].new_zeros(()).expand(groups, batch, hidden)
    need_input, need_context, need_weights, need_hx = (
        any(need) if isinstance(need, (list, tuple)) else need for need in ctx.needs_input_grad[:4]
    )
    if dispatch.a_mode_looks_on():
        flops.tell_counters()
    if not save:  # Traced with frozen weights, say, and then trained, or something before it.
        operands = inputs, contexts, weights, hx, lengths
        with torch.no_grad():
            saved = torch.ops.mmixer_kernels.mcu_forward(
                *operands, mix, eps, engine, True, recompute
            )[2]
    grad_inputs, grad_contexts, grad_weights, grad_hx = torch.ops.mmixer_kernels.mcu_backward(
        grad_output,
        grad_h_n,
        inputs,
        contexts,
        weights,
        hx,
        lengths,
        saved,
        mix,
        eps,
        engine,
        recompute,
        need_input,
        need_weights,
    )
    return (
        grad_inputs if need_input else [None] * groups,
        grad_contexts if need_context else [None] * groups,
        grad_weights if need_weights else [None] * len(weights),
        grad_hx if need_hx and ctx.has_hx else None,
        *[None] * 6,
    )


def _backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    inputs: list[Tensor],
    contexts: list[Tensor],
    weights: list[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    saved: Tensor,
    mix: str,
    eps: float,
    engine: str,
    recompute: bool,
    need_input: bool,
    need_weights: bool,
) -> _Backward:
    sets = Weights.sets(weights, len(inputs))
    tensors = [*inputs, *contexts, *weights, *_given(hx, lengths)]
    _check_memory(tensors, inputs, contexts, sets, hx, lengths)
    with arguments.without_autocast(inputs[0]):
        grad_inputs, grad_contexts, grad_weights, grad_hx = _engine(engine, inputs).backward(
            grad_output,
            grad_h_n,
            inputs,
            contexts,
            sets,
            hx,
            lengths,
            saved,
            mix,
            eps,
            recompute,
            need_input,
            need_weights,
        )
    flat = [tensor for group in grad_weights for tensor in group.tensors()]
    return grad_inputs, grad_contexts, flat, grad_hx


def _backward_fake(
    grad_output: Tensor,
    grad_h_n: Tensor,
    inputs: list[Tensor],
    contexts: list[Tensor],
    weights: list[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    saved: Tensor,
    mix: str,
    eps: float,
    engine: str,
    recompute: bool,
    need_input: bool,
    need_weights: bool,
) -> _Backward:
    def fresh(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in tensors]

    return (
        fresh(inputs) if need_input else [],
        fresh(contexts),
        fresh(weights) if need_weights else [],
        grad_h_n.new_empty(grad_h_n.shape),
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: _Backward) -> None:
    grad_output, grad_h_n, sequences, contexts, weights, hx, lengths, _, mix, eps = inputs[:10]
    ctx.groups, ctx.weights = len(sequences), len(weights)
    ctx.lengths, ctx.options = lengths, (mix, eps, *inputs[11:])
    ctx.set_materialize_grads(False)
    state = [] if hx is None else [hx]
    ctx.save_for_backward(grad_output, grad_h_n, *sequences, *contexts, *weights, *state)


def _backward_autograd(
    ctx: Any,
    grad_inputs: Sequence[Tensor | None],
    grad_contexts: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    grad_hx: Tensor | None,
) -> tuple[Any, ...]:
    """The derivative of the reference's hand-derived backward, by autograd."""
    saved = ctx.saved_tensors
    with torch.enable_grad(), arguments.without_autocast(saved[0]):
        # Aliases, since one operand may have been computed from another: what is wanted here are
        # the partial derivatives, still connected to the operands for a third derivative.
        aliases = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in saved]
        groups = ctx.groups
        grad_output, grad_h_n, *operands = aliases
        inputs, contexts = operands[:groups], operands[groups : 2 * groups]
        weights = operands[2 * groups : 2 * groups + ctx.weights]
        hx = (
            operands[2 * groups + ctx.weights] if len(operands) > 2 * groups + ctx.weights else None
        )
        first = get("reference").backward(
            grad_output,
            grad_h_n,
            inputs,
            contexts,
            Weights.sets(weights, groups),
            hx,
            ctx.lengths,
            grad_output.new_empty(0),
            *ctx.options,
        )
        of_weights = [tensor for group in first[2] for tensor in group.tensors()]
        values = [*first[0], *first[1], *of_weights, first[3]]
        cotangents = [*grad_inputs, *grad_contexts, *grad_weights, grad_hx]
        pairs = [(x, v) for x, v in zip(values, cotangents, strict=True) if v is not None]
    with arguments.without_autocast(grad_output):
        second: list[Tensor | None] = list(
            torch.autograd.grad(
                [x for x, _ in pairs],
                aliases,
                [v for _, v in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    operand_grads = second[2:]
    return (
        second[0],
        second[1],
        operand_grads[:groups],
        operand_grads[groups : 2 * groups],
        operand_grads[2 * groups : 2 * groups + ctx.weights],
        None if hx is None else operand_grads[-1],
        *[None] * 8,
    )


for _name, _implementation, _fake, _setup, _autograd in (
    ("mcu_forward", _forward, _forward_fake, _forward_setup, _forward_autograd),
    ("mcu_backward", _backward, _backward_fake, _backward_setup, _backward_autograd),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _qualified_name = f"mmixer_kernels::{_name}"
    torch.library.register_fake(_qualified_name, _fake, lib=_library)
    torch.library.register_autograd(_qualified_name, _autograd, setup_context=_setup, lib=_library)

_both = torch.ops.mmixer_kernels.mcu_forward, torch.ops.mmixer_kernels.mcu_backward
for _qualified_name, _rule in (
    ("mmixer_kernels::mcu_forward", partial(batching.forward, _both[0])),
    ("mmixer_kernels::mcu_backward", partial(batching.backward, *_both)),
):
    torch.library.register_vmap(_qualified_name, _rule, lib=_library)
with suppress(RuntimeError):  # Some day torch will not have this key.
    _library.impl(
        "mcu_backward", partial(batching.backward_of_batched_gradients, *_both), "Batched"
    )
