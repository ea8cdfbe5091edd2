"""The MCU as functions.

A plain call goes straight to its engine (`plain`). For any other, arguments are checked, an engine
is chosen, and the op is called (`ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NoReturn

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, autocast, ops, plain
from .engines import choose
from .problem import Problem, Step, Weights

__all__ = ["Weights", "mcu", "mcu_cell", "mcu_group"]


def mcu(
    input: Tensor | PackedSequence,
    context: Tensor,
    weights: Weights,
    hx: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    mix: str = "gated",
    batch_first: bool = False,
    eps: float = 1e-5,
    engine: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Equations 7-14 of the paper over a sequence; `FusedMCU` without the module.

    Args:
        input: `[T, B, input_size]`, `[B, T, input_size]` when batch_first, `[T, input_size]`
            unbatched, or a PackedSequence; float64, float32, bfloat16 or float16.
        context: `[B, context_size]`, or `[context_size]` unbatched.
        weights: one weight set; without `norm_weight` and `norm_bias` there is no LayerNorm. In
            input's dtype, or bfloat16 beside a float32 input.
        hx: initial state `[1, B, H]` (`[1, H]` unbatched), zeros when None.
        lengths: integers `[B]` in 1..T: past a sample's length the input is not used, the output
            is 0 and h_n is the sample's own last valid step.
        mix: "gated" is Eq. 9-10, "concat" Table 3's experiment II.
        eps: added to LayerNorm's variance.
        engine: "auto" or the name of an engine, see `mmixer_kernels.engines()`.
        recompute: save only the states for backward, which then computes the rest again, to the
            same bits. They are T B H values; without recompute, the memory of about six times as
            many is saved on a CPU, and on the CUDA engine of five times as many, or four times
            with 16-bit inputs. The Triton engine always saves the states alone, and the reference
            nothing.

    Returns:
        output, like input with H features, and h_n `[1, B, H]` (`[1, H]` unbatched).

    Raises:
        ValueError: a wrong shape, device, length or option. TypeError: a wrong dtype, what is no
        tensor, or no bool. RuntimeError: the engine asked for cannot run here.
    """
    arguments.check_bool("recompute", recompute)
    if not isinstance(weights, Weights):
        _refuse_weights("weights", weights)
    seen = input, context, hx, lengths, *weights
    if has_torch_function(seen):
        return handle_torch_function(
            mcu,
            seen,
            input,
            context,
            weights,
            hx,
            lengths,
            mix=mix,
            batch_first=batch_first,
            eps=eps,
            engine=engine,
            recompute=recompute,
        )
    options = (mix, batch_first, eps, engine, recompute)
    if isinstance(input, Tensor):
        results = plain.sequence(input, context, weights, hx, lengths, options)
        if results is not None:
            return results
    layout = arguments.Layout.of(input, batch_first)
    input, context, hx, lengths = layout.arrange(input, context, hx, lengths)
    problem = Problem([input], [context], [weights], hx, lengths, mix, eps)
    output, h_n = _run(problem, engine, recompute, grouped=False)
    return layout.restore(output.squeeze(0), h_n)


def mcu_group(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Weights],
    hx: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    mix: str = "gated",
    batch_first: bool = False,
    eps: float = 1e-5,
    engine: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """G MCUs of one hidden size, each on a sequence of its own, in one call of the engine.

    Args:
        inputs: G tensors `[T, B, input_size]` (`[B, T, input_size]` when batch_first); T and B are
            the same for all, the input sizes may differ.
        contexts: G tensors `[B, context_size]`; the context sizes may differ.
        weights: G weight sets.
        hx: `[G, B, H]`, zeros when None.
        lengths, mix, eps, engine, recompute: as in `mcu`, one for all.

    Returns:
        output `[G, T, B, H]` (`[G, B, T, H]` when batch_first) and h_n `[G, B, H]`.

    Raises:
        As `mcu`, and ValueError where the groups do not agree.
    """
    arguments.check_bool("recompute", recompute)
    named = {"inputs": inputs, "contexts": contexts, "weights": weights}
    for name, value in named.items():
        arguments.check_sequence(name, value)
    groups = len(inputs)
    if groups == 0 or len(contexts) != groups or len(weights) != groups:
        raise ValueError(
            "inputs, contexts and weights must have one entry per group, but have "
            f"{groups}, {len(contexts)} and {len(weights)}"
        )
    for i, weight_set in enumerate(weights):
        if not isinstance(weight_set, Weights):
            _refuse_weights(f"weights[{i}]", weight_set)
    seen = *inputs, *contexts, hx, lengths, *chain.from_iterable(weights)
    if has_torch_function(seen):
        return handle_torch_function(
            mcu_group,
            seen,
            inputs,
            contexts,
            weights,
            hx,
            lengths,
            mix=mix,
            batch_first=batch_first,
            eps=eps,
            engine=engine,
            recompute=recompute,
        )
    options = (mix, batch_first, eps, engine, recompute)
    results = plain.group(inputs, contexts, weights, hx, lengths, options)
    if results is not None:
        return results
    for i, (input, context) in enumerate(zip(inputs, contexts, strict=True)):
        arguments.check_tensor(f"inputs[{i}]", input)
        arguments.check_tensor(f"contexts[{i}]", context)
        if input.ndim != 3:
            raise ValueError(
                f"inputs[{i}] must have three dimensions, but has shape {list(input.shape)}"
            )
        if context.ndim != 2:
            raise ValueError(
                f"contexts[{i}] must be [B, context_size], but has shape {list(context.shape)}"
            )
    arguments.check_bool("batch_first", batch_first)
    if batch_first:
        inputs = [input.transpose(0, 1) for input in inputs]
    problem = Problem(inputs, contexts, weights, hx, lengths, mix, eps)
    output, h_n = _run(problem, engine, recompute, grouped=True)
    return (output.transpose(1, 2) if batch_first else output), h_n


def mcu_cell(
    input: Tensor,
    context: Tensor,
    weights: Weights,
    hx: Tensor | None = None,
    *,
    mix: str = "gated",
    eps: float = 1e-5,
    engine: str = "auto",
) -> Tensor:
    """One step of `mcu`; `FusedMCUCell` without the module.

    Args:
        input: `[B, input_size]`, or `[input_size]` unbatched.
        context: `[B, context_size]`, or `[context_size]` unbatched.
        weights, mix, eps, engine: as in `mcu`.
        hx: `[B, H]` (`[H]` unbatched), zeros when None.

    Returns:
        The next state `[B, H]` (`[H]` unbatched).

    Raises:
        As `mcu`.
    """
    if not isinstance(weights, Weights):
        _refuse_weights("weights", weights)
    seen = input, context, hx, *weights
    if has_torch_function(seen):
        return handle_torch_function(
            mcu_cell, seen, input, context, weights, hx, mix=mix, eps=eps, engine=engine
        )
    arguments.check_tensor("input", input)
    next_state = plain.step(Step(input, context, weights, hx, mix, eps), engine)
    if next_state is not None:
        return next_state
    dims = input.ndim
    if dims not in (1, 2):
        raise ValueError(
            "input must be [B, input_size], or [input_size] unbatched, "
            f"but has shape {list(input.shape)}"
        )
    others = {"context": context} if hx is None else {"context": context, "hx": hx}
    for name, value in others.items():
        tensor = arguments.check_tensor(name, value)
        if tensor.ndim != dims:
            raise ValueError(
                f"{name} must have as many dimensions as input, {dims}, "
                f"but has shape {list(tensor.shape)}"
            )
    if dims == 1:
        state = None if hx is None else hx.unsqueeze(0)
        batch = (input.unsqueeze(0), context.unsqueeze(0), weights, state)
        return mcu_cell(*batch, mix=mix, eps=eps, engine=engine).squeeze(0)
    step = autocast.cast(Step(input, context, weights, hx, mix, eps), input.device.type)
    arguments.check_step(step)
    return ops.run_step(step, choose(engine, step.input))


def _refuse_weights(name: str, weights: object) -> NoReturn:
    raise TypeError(
        f"{name} must be mmixer_kernels.functional.Weights, but is a {type(weights).__name__}"
    )


def _run(problem: Problem, engine: str, recompute: bool, grouped: bool) -> tuple[Tensor, Tensor]:
    """Output `[G, T, B, H]` and h_n `[G, B, H]`; the messages are `mcu_group`'s where grouped."""
    problem = autocast.cast(problem, problem.inputs[0].device.type)
    arguments.check(problem, grouped)
    return ops.run(problem, choose(engine, problem.inputs[0]), recompute)
