"""The extension's engines: a pass is one native call, which allocates its results by torch.

The extension reads the tensors itself and refuses, by ValueError or TypeError, whatever does not
fit as it is; `stored` converts what may be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..problem import Call, Cotangents, Form, Gradients, Keep, Need, Problem, Step, Weights

Results = tuple[Tensor, Tensor | None, Tensor | None]
Forward = Callable[[Call, Sequence[Tensor]], Results]
Backward = Callable[
    [Call, Sequence[Tensor], Tensor, Sequence[Tensor | None], Sequence[bool]], Sequence[Any]
]
"""`run_forward` and `run_backward` of `protocol.NativeEngine`."""


def forward(run: Forward, problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """An engine's `forward` by its `run_forward`."""
    call = Call(Form.of(problem.flat()), keep)
    _check_devices(problem.tensors())
    try:
        output, h_n, saved = run(call, problem.tensors())
    except (TypeError, ValueError):
        output, h_n, saved = run(call, stored(problem, problem.dtype).tensors())
    assert h_n is not None  # as it is no step
    return output, h_n, saved


def step(run: Forward, step: Step) -> Tensor:
    """An engine's `step` by its `run_forward`."""
    call = Call(step.form(), "nothing", "step")
    try:
        return run(call, step.tensors())[0]
    except (TypeError, ValueError):
        return run(call, stored_step(step, step.input.dtype).tensors())[0]


def backward(
    run: Backward, problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """An engine's `backward` by its `run_backward`."""
    dtype, form = problem.dtype, Form.of(problem.flat())
    call = Call(form, keep)
    grads = [None if x is None else x.to(dtype) for x in cotangents]
    _check_devices([saved, *(x for x in grads if x is not None), *problem.tensors()])
    needs = [
        *[need.input] * form.groups,
        *[True] * form.contexts,
        *[need.weights] * form.weights,
        *[True] * form.has_hx,
        *[False] * form.has_lengths,
        *[True] * (not form.has_hx),  # The first state's gradient is wanted also where it is zero.
    ]
    try:
        found = run(call, problem.tensors(), saved, grads, needs)
    except (TypeError, ValueError):
        found = run(call, stored(problem, dtype).tensors(), saved.contiguous(), grads, needs)
    inputs, contexts, weights, grad_hx, *_ = form.fill(found)
    sets = Weights.sets(weights, form.groups, form.has_context) if need.weights else []
    return Gradients(
        list(inputs) if need.input else [],
        list(contexts),
        [x.to_dtypes_of(y) for x, y in zip(sets, problem.weights, strict=False)],
        grad_hx if form.has_hx else found[-1],
    )


def _check_devices(tensors: Sequence[Tensor]) -> None:
    """The extension reads addresses alone, and one of another device is none to a kernel."""
    devices = dict.fromkeys(str(x.device) for x in tensors)
    if len(devices) > 1:
        raise ValueError(
            "a call's operands, what its forward saved and its results' gradients must be on one "
            f"device, but are on {' and '.join(devices)}"
        )


def stored(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem as the extension reads it: inputs, contexts and hx in `dtype` with contiguous
    rows, the weight sets contiguous and each kind in one dtype, lengths in int64. It is checked
    first, since a conversion would hide what is wrong."""
    arguments.check(problem)
    inputs, contexts, weights, hx, lengths, *_ = problem
    return problem._replace(
        inputs=[rows(input, dtype) for input in inputs],
        contexts=[rows(context, dtype) for context in contexts],
        weights=stored_weights(weights, dtype),
        hx=None if hx is None else rows(hx, dtype),
        lengths=None if lengths is None else lengths.to(torch.int64).contiguous(),
    )


def stored_step(step: Step, dtype: torch.dtype) -> Step:
    """`stored` of a step."""
    arguments.check_step(step)
    input, context, weights, hx, mix, eps = step
    (weights,) = stored_weights([weights], dtype)
    context = None if context is None else rows(context, dtype)
    hx = None if hx is None else rows(hx, dtype)
    return Step(rows(input, dtype), context, weights, hx, mix, eps)


def rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype with contiguous rows; a copy only where it has not."""
    tensor = tensor.to(dtype)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor


def matmul_precision() -> str:
    """Whether torch's float32 products on a GPU may round operands to TF32, "high", or "highest".

    `torch.get_float32_matmul_precision` raises, or tells what was, where one of torch's newer names
    has set it, such as `torch.backends.cuda.matmul.fp32_precision`.
    """
    return "high" if _fp32_precision("cuda", "matmul") == "tf32" else "highest"


# What `torch.backends.cuda.matmul.fp32_precision` asks, at a tenth of its time.
_fp32_precision: Callable[[str, str], str] = getattr(
    torch._C,
    "_get_fp32_precision_getter",
    lambda *_: torch.backends.cuda.matmul.fp32_precision,
)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


_NOTHING = nullcontext()


def stored_weights(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    """The sets, contiguous. The matrices, and likewise the norms, stay in bfloat16 where all of
    them are in it, and are else in `dtype`."""
    matrices = _common(dtype, (x for group in weights for x in group.matrices()))
    norms = _common(dtype, (x for group in weights for x in group.norms()))

    def convert(group: Weights) -> Weights:
        dtypes = [matrices] * 6 + [norms] * 2
        pairs = zip(group, dtypes, strict=True)
        return Weights._make(None if x is None else x.to(to).contiguous() for x, to in pairs)

    return [convert(group) for group in weights]


def _common(dtype: torch.dtype, tensors: Iterable[Tensor]) -> torch.dtype:
    narrow = all(tensor.dtype is torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if narrow else dtype
