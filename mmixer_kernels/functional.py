"""The MCU as functions.

A plain call goes straight to its engine (`plain`). For any other, arguments are checked, an engine
is chosen, and the op is called (`ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, autocast, ops, plain
from .engines import choose
from .problem import Layout, Problem, Step, Weights

__all__ = ["Weights", "mask_to_lengths", "mcu", "mcu_cell", "mcu_group"]


def mcu(
    input: Tensor | PackedSequence,
    context: Tensor | None,
    weights: Weights | tuple[Weights, Weights],
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
        context: `[B, context_size]`, or `[context_size]` unbatched; None beside weights without
            `weight_g` and `weight_s`: Eq. 8-10 fall away, and f_tilde is f_bar.
        weights: one weight set; without `norm_weight` and `norm_bias` there is no LayerNorm. In
            input's dtype, or bfloat16 beside a float32 input. A pair of sets goes through the
            sequence in both directions: the second one runs from each sample's own last step to
            its first.
        hx: initial state `[D, B, H]` (`[D, H]` unbatched), zeros when None; D is the number of
            weight sets, 1 or 2.
        lengths: integers `[B]` in 1..T: past a sample's length the input is not used, the output
            is 0 and h_n is the sample's own last valid step.
        mix: "gated" is Eq. 9-10, "concat" Table 3's experiment II.
        batch_first: input and output are `[B, T, ...]` instead of `[T, B, ...]`.
        eps: added to LayerNorm's variance.
        engine: "auto" or the name of an engine, see `mmixer_kernels.engines()`.
        recompute: save only the states for backward, which then computes the rest again, to the
            same bits. They are T B H values per weight set; without recompute, the memory of about
            six times as many is saved on a CPU, and on the CUDA engine of five times as many, or
            four times with 16-bit inputs; without context five times on a CPU, and three on the
            CUDA engine, or two and a half. The Triton engine always saves the states alone, and
            the reference nothing.

    Returns:
        output, like input with D H features, those of both directions beside each other, and h_n
        `[D, B, H]` (`[D, H]` unbatched).

    Raises:
        ValueError: a wrong shape, device, length or option.
        TypeError: a wrong dtype, what is no tensor, or no bool.
        RuntimeError: the engine asked for cannot run here.
    """
    arguments.check_bool("recompute", recompute)
    sets = (weights,) if isinstance(weights, Weights) else _both_directions(weights)
    seen = input, context, hx, lengths, *chain.from_iterable(sets)
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
        results = plain.sequence(input, context, sets, hx, lengths, options)
        if results is not None:
            return results
    count = len(sets)
    layout = arguments.Layout.of(input, batch_first)
    input, context, hx, lengths = layout.arrange(input, context, hx, lengths, count)
    contexts = [] if context is None else [context]
    problem = Problem([input], contexts, sets, hx, lengths, mix, eps, count == 2)
    cast = autocast.cast(problem, input.device.type)  # which both directions share
    problem = cast._replace(inputs=[*cast.inputs] * count, contexts=[*cast.contexts] * count)
    output, h_n = _run(problem, engine, recompute, "sequence" if count == 1 else "concatenated")
    features = output.squeeze(0) if count == 1 else output.permute(1, 2, 0, 3).flatten(2)
    return layout.restore(features, h_n)


def mcu_group(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor] | None,
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
        contexts: G tensors `[B, context_size]`; the context sizes may differ. None beside weight
            sets without `weight_g` and `weight_s`, as in `mcu`.
        weights: G weight sets.
        hx: `[G, B, H]`, zeros when None.
        lengths: as in `mcu`, one for all.
        mix: likewise.
        batch_first: likewise.
        eps: likewise.
        engine: likewise.
        recompute: likewise.

    Returns:
        output `[G, T, B, H]` (`[G, B, T, H]` when batch_first) and h_n `[G, B, H]`.

    Raises:
        ValueError: as `mcu`, and where the groups do not agree.
        TypeError: as `mcu`.
        RuntimeError: as `mcu`.
    """
    arguments.check_bool("recompute", recompute)
    named = {"inputs": inputs, "contexts": contexts, "weights": weights}
    if contexts is None:
        del named["contexts"]
    for name, value in named.items():
        arguments.check_sequence(name, value)
    groups = len(inputs)
    counts = [len(value) for value in named.values() if value is not None]
    if groups == 0 or counts != [groups] * len(counts):
        raise ValueError(
            f"{_listed(list(named))} must have one entry per group, but have {_listed(counts)}"
        )
    for i, weight_set in enumerate(weights):
        if not isinstance(weight_set, Weights):
            _refuse_weights(f"weights[{i}]", weight_set)
    seen = (
        *inputs,
        *(() if contexts is None else contexts),
        hx,
        lengths,
        *chain.from_iterable(weights),
    )
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
    for i, input in enumerate(inputs):
        arguments.check_tensor(f"inputs[{i}]", input)
        if input.ndim != 3:
            raise ValueError(
                f"inputs[{i}] must have three dimensions, but has shape {list(input.shape)}"
            )
    for i, context in enumerate(contexts or ()):
        arguments.check_tensor(f"contexts[{i}]", context)
        if context.ndim != 2:
            raise ValueError(
                f"contexts[{i}] must be [B, context_size], but has shape {list(context.shape)}"
            )
    arguments.check_bool("batch_first", batch_first)
    if batch_first:
        inputs = [input.transpose(0, 1) for input in inputs]
    problem = Problem(inputs, contexts or [], weights, hx, lengths, mix, eps)
    problem = autocast.cast(problem, inputs[0].device.type)
    output, h_n = _run(problem, engine, recompute, "group")
    return (output.transpose(1, 2) if batch_first else output), h_n


def mcu_cell(
    input: Tensor,
    context: Tensor | None,
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
        context: `[B, context_size]`, or `[context_size]` unbatched; None as in `mcu`.
        weights: one weight set, as in `mcu`.
        hx: `[B, H]` (`[H]` unbatched), zeros when None.
        mix: as in `mcu`.
        eps: likewise.
        engine: likewise.

    Returns:
        The next state `[B, H]` (`[H]` unbatched).

    Raises:
        ValueError: as `mcu`.
        TypeError: as `mcu`.
        RuntimeError: as `mcu`.
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
    for name, value in {"context": context, "hx": hx}.items():
        if value is None:
            continue
        tensor = arguments.check_tensor(name, value)
        if tensor.ndim != dims:
            raise ValueError(
                f"{name} must have as many dimensions as input, {dims}, "
                f"but has shape {list(tensor.shape)}"
            )
    if dims == 1:
        operands = (None if x is None else x.unsqueeze(0) for x in (context, hx))
        context, hx = operands
        batch = input.unsqueeze(0)
        return mcu_cell(batch, context, weights, hx, mix=mix, eps=eps, engine=engine).squeeze(0)
    step = autocast.cast(Step(input, context, weights, hx, mix, eps), input.device.type)
    arguments.check_step(step)
    return ops.run_step(step, choose(engine, step.input))


def mask_to_lengths(mask: Tensor) -> Tensor:
    """The `lengths` of a padded batch, of the mask that other libraries take.

    Args:
        mask: bool `[B, T]`, True where a sample has a step: on its first steps, at least one.

    Returns:
        lengths, int64 `[B]`, on the mask's device.

    Raises:
        ValueError: another shape, a sample without a step, or one with a hole or with padding on
        its left. TypeError: another dtype, or what is no tensor.

    The values are looked at, for which a GPU is waited for; torch.compile and transforms of
    torch.func, which cannot look, take the mask as it is.

    Examples:
        >>> mask_to_lengths(torch.tensor([[True, True, False], [True, False, False]]))
        tensor([2, 1])
    """
    arguments.check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        name = str(mask.dtype).removeprefix("torch.")
        raise TypeError(f"mask must be bool, but is {name}: convert it with .bool()")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [B, T], but has shape {list(mask.shape)}")
    lengths = mask.sum(1)
    if arguments.can_look_at(mask):
        steps = torch.arange(mask.shape[1], device=mask.device)
        wrong = ((steps < lengths[:, None]) != mask).any(1) | (lengths == 0)
        if bool(wrong.any()):
            sample = int(wrong.nonzero()[0])
            row = mask[sample].nonzero().squeeze(1).tolist()
            raise ValueError(
                "mask must be True on each sample's first steps, one at least, and False on the "
                f"rest, but that of sample {sample} is True at the steps {row}: move its steps to "
                "the front, or leave the sample out"
            )
    return lengths


def _refuse_weights(name: str, weights: object, or_else: str = "") -> NoReturn:
    count = f" of {len(weights)}" if isinstance(weights, tuple | list) else ""
    raise TypeError(
        f"{name} must be mmixer_kernels.functional.Weights{or_else}, "
        f"but is a {type(weights).__name__}{count}"
    )


def _both_directions(weights: object) -> tuple[Weights, Weights]:
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        _refuse_weights("weights", weights, ", or a pair of them")
    for i, weight_set in enumerate(weights):
        if not isinstance(weight_set, Weights):
            _refuse_weights(f"weights[{i}]", weight_set)
    return weights[0], weights[1]


def _listed(words: Sequence[object]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}"


def _run(problem: Problem, engine: str, recompute: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output `[G, T, B, H]` and h_n `[G, B, H]`; the messages have the names of the layout."""
    arguments.check(problem, layout)
    return ops.run(problem, choose(engine, problem.inputs[0]), recompute)
