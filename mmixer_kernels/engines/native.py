"""The extension's engines: a pass is one native call, on memory that is allocated here.

The extension reads `problem.Problem` itself and refuses, by ValueError or TypeError, whatever does
not fit as it is; `stored` converts what may be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step, Weights


def read(extension: Any, problem: Problem, keep: Keep) -> tuple[Any, Problem]:
    """The call as the extension takes it, and the problem whose tensors it points to."""
    try:
        return extension.Problem(problem=problem, keep=keep), problem
    except (TypeError, ValueError):
        problem = stored(problem, problem.dtype)
    return extension.Problem(problem=problem, keep=keep), problem


Planner = Callable[[Problem], Any]
"""Makes the plan of a pass, for an extension that takes one."""


def _planned(plan: Planner | None, problem: Problem) -> dict[str, Any]:
    return {} if plan is None else {"plan": plan(problem)}


def forward(
    extension: Any, problem: Problem, keep: Keep, plan: Planner | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]` and h_n `[G, B, H]` in the inputs' dtype, and what is left for
    `backward`, None for nothing.

    Args:
        options: the extension's own arguments.
    """
    native, problem = read(extension, problem, keep)
    planned = _planned(plan, problem)
    groups, steps, batch, hidden = problem.sizes
    empty = problem.inputs[0].new_empty
    output, h_n = empty((groups, steps, batch, hidden)), empty((groups, batch, hidden))
    saved = None
    if keep != "nothing":
        saved = empty(extension.saved_size(problem=native), dtype=problem.compute_dtype)
    size = extension.forward_workspace_size(problem=native, **planned)
    extension.forward(
        problem=native,
        **planned,
        output=output,
        h_n=h_n,
        saved=saved,
        workspace=empty(size, dtype=torch.uint8),
        **options,
    )
    return output, h_n, saved


def backward(
    extension: Any,
    problem: Problem,
    saved: Tensor,
    keep: Keep,
    cotangents: Cotangents,
    need: Need,
    plan: Planner | None = None,
    in_their_dtypes: bool = False,
    **options: Any,
) -> Gradients:
    """The gradients in the operands' dtypes, from what `forward` left.

    Args:
        in_their_dtypes: the extension writes the weights' gradients in the dtypes that it reads
            these in, instead of in the inputs'.
        options: the extension's own arguments.
    """
    given = problem
    native, problem = read(extension, problem, keep)
    planned = _planned(plan, problem)
    dtype = problem.dtype
    cotangents = Cotangents._make(None if x is None else rows(x, dtype) for x in cotangents)
    groups, _, batch, hidden = problem.sizes
    gradients = Gradients(
        [_like(x, dtype) for x in problem.inputs] if need.input else [],
        [_like(x, dtype) for x in problem.contexts],
        [_weights_like(x, None if in_their_dtypes else dtype) for x in problem.weights]
        if need.weights
        else [],
        problem.inputs[0].new_empty((groups, batch, hidden)),
    )
    size = extension.backward_workspace_size(problem=native, **planned, need_weights=need.weights)
    extension.backward(
        problem=native,
        **planned,
        cotangents=cotangents,
        saved=saved,
        gradients=gradients,
        grad_hx=gradients.hx,
        workspace=saved.new_empty(size, dtype=torch.uint8),
        **options,
    )
    weights = gradients.weights
    if problem is not given or not (in_their_dtypes or _dtypes(problem.weights[0]) == {dtype}):
        weights = [x.to_dtypes_of(y) for x, y in zip(weights, given.weights, strict=False)]
    return gradients._replace(weights=weights)


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory for a gradient."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)  # at half the host's time
    return tensor.new_empty(tensor.shape, dtype=dtype)


def _weights_like(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Memory for the gradients of a weight set that the extension has read: it is contiguous. None:
    in the set's own dtypes."""
    if dtype is None or _dtypes(weights) == {dtype}:
        return Weights(*map(torch.empty_like, weights.tensors()))
    return weights.map(lambda x: torch.empty_like(x, dtype=dtype))


def _dtypes(weights: Weights) -> set[torch.dtype]:
    """The dtypes of a set that the extension has read: of its matrices and of its norms."""
    first, norm = weights.weight_f, weights.norm_weight
    return {first.dtype} if norm is None else {first.dtype, norm.dtype}


def stored(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem as the extension reads it: inputs, contexts and hx in `dtype` with contiguous
    rows, the weight sets contiguous and each kind in one dtype, lengths in int64. It is checked
    first, since a conversion would hide what is wrong."""
    arguments.check(problem)
    inputs, contexts, weights, hx, lengths, mix, eps = problem
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    return Problem(
        [rows(input, dtype) for input in inputs],
        [rows(context, dtype) for context in contexts],
        stored_weights(weights, dtype),
        None if hx is None else rows(hx, dtype),
        lengths,
        mix,
        eps,
    )


def stored_step(step: Step, dtype: torch.dtype) -> Step:
    """`stored` of a step."""
    arguments.check_step(step)
    input, context, weights, hx, mix, eps = step
    (weights,) = stored_weights([weights], dtype)
    hx = None if hx is None else rows(hx, dtype)
    return Step(rows(input, dtype), rows(context, dtype), weights, hx, mix, eps)


def rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype with contiguous rows; a copy only where it has not."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor


def stored_weights(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    """The sets, contiguous. The matrices, and likewise the norms, stay in bfloat16 where all of
    them are in it, and are else in `dtype`."""
    matrices = _common(dtype, (x for group in weights for x in group.matrices()))
    norms = _common(dtype, (x for group in weights for x in group.norms()))

    def convert(group: Weights) -> Weights:
        tensors = [x.to(matrices).contiguous() for x in group.matrices()]
        return Weights(*tensors, *(x.to(norms).contiguous() for x in group.norms()))

    return [convert(group) for group in weights]


def _common(dtype: torch.dtype, tensors: Iterable[Tensor]) -> torch.dtype:
    narrow = all(tensor.dtype is torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if narrow else dtype
