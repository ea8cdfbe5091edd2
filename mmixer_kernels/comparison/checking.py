"""The check against float64 that an engine has to pass before a time of it is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Largest ||x - truth|| / ||truth|| of a float32 output or gradient."""


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
    with one_thread():
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations take longest where their threads wait for a busy processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
