"""The check against float64 that an engine has to pass before a time of it is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..engines.native import matmul_precision
from ..modules import FusedMCU
from ..problem import Weights
from .timing import torch_threads

TOLERANCE = 1e-4
"""Largest ||x - truth|| / ||truth|| of a float32 output or gradient."""
_TOLERANCES = {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32 = 5e-3


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of a dtype's output or gradient, in the precision that torch's
    float32 products have on the device."""
    if dtype == torch.float32 and device.type == "cuda" and matmul_precision() != "highest":
        return _TF32
    return _TOLERANCES.get(dtype, TOLERANCE)


class WrongResult(AssertionError):
    """An engine's result that is farther from float64 than it may be."""


class Subject(NamedTuple):
    """A kernel as a function of named leaf tensors, and the same in reference equations."""

    run: Callable[..., tuple[Tensor, ...]]
    truth: Callable[..., tuple[Tensor, ...]]
    operands: dict[str, Tensor]


def relative_errors(subject: Subject) -> dict[str, float]:
    """`relative_error` of each output, with and without gradients needed, and of each gradient,
    against float64."""
    torch.manual_seed(1)
    operands = subject.operands
    doubles = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    outputs = subject.run(*operands.values())
    with torch.no_grad():
        plain = subject.run(*operands.values())
    directions = [torch.randn_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, list(operands.values()), directions)
    with torch_threads(1):  # many small operations wait for each other's threads on busy processors
        expected = subject.truth(*doubles.values())
        expected_grads = torch.autograd.grad(
            expected, list(doubles.values()), [direction.double() for direction in directions]
        )

    errors = {}
    for i, truth in enumerate(expected):
        errors[f"output {i}"] = relative_error(outputs[i], truth)
        errors[f"output {i} under no_grad"] = relative_error(plain[i], truth)
    for name, grad, truth in zip(operands, grads, expected_grads, strict=True):
        errors[f"gradient of {name}"] = relative_error(grad, truth)
    return errors


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth||; absolute where the truth is zero."""
    norm = truth.detach().norm()
    difference = (x.detach().double() - truth.detach()).norm()
    return float(difference / norm if norm > 0 else difference)


def check(subject: Subject, tolerance: float = TOLERANCE) -> float:
    """The largest relative error; WrongResult where one passes tolerance or is not finite."""
    return largest(relative_errors(subject), tolerance)


def largest(errors: dict[str, float], tolerance: float = TOLERANCE) -> float:
    """The largest error; WrongResult where one passes tolerance or is not finite."""
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    if wrong:
        raise WrongResult(f"relative errors must be below {tolerance}, but are {wrong}: no timing")
    return max(errors.values())


def unit_subject(unit: FusedMCU, operands: Sequence[Tensor]) -> Subject:
    """A FusedMCU as a function of input, context where it has one, and its parameters."""
    count = len(operands)

    def truth(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = exact(tensors[:count], tensors[count:])
        return output, h_n.unsqueeze(0)

    named = dict(zip(("input", "context"), operands, strict=False))
    return Subject(lambda *x: unit(*x[:count]), truth, named | dict(unit.named_parameters()))


def exact(operands: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and h_n by the reference, in float64, of `[input, context]`, or `[input]` alone, and
    the parameters that there are."""
    input, *contexts = (x.double() for x in operands)
    (own,) = Weights.sets([x.double() for x in weights], 1, has_context=bool(contexts))
    return reference.mcu(input, contexts[0] if contexts else None, own)
