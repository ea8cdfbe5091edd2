"""Problems, and how far a result is from the float64 reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmixer_kernels import reference
from mmixer_kernels.reference import Weights


class Size(NamedTuple):
    steps: int
    batch: int
    input: int
    context: int
    hidden: int


ODD_SIZES = [
    Size(1, 1, 1, 1, 1),
    Size(3, 2, 3, 4, 5),
    Size(1, 4, 8, 8, 16),
    Size(5, 1, 9, 20, 33),
    Size(7, 13, 17, 5, 31),
    Size(37, 5, 24, 16, 40),
]


class Problem(NamedTuple):
    """Operands in float64, and random gradients of output and h_n."""

    input: Tensor
    context: Tensor
    weights: Weights
    hx: Tensor
    lengths: Tensor | None
    grad_output: Tensor
    grad_h_n: Tensor

    def operands(self) -> dict[str, Tensor]:
        named = {"input": self.input, "context": self.context, "hx": self.hx}
        named.update((k, v) for k, v in self.weights._asdict().items() if v is not None)
        return named

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values, rounded to dtype (lengths stay)."""
        weights = self.weights.map(lambda x: x.to(dtype))
        tensors = {k: v.to(dtype) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**{**tensors, "weights": weights, "lengths": self.lengths})


def problem(
    size: Size, *, layer_norm: bool = True, lengths: bool = False, dtype: torch.dtype | None = None
) -> Problem:
    steps, batch, input, context, hidden = size

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def weight(*shape: int) -> Tensor:
        return (torch.rand(shape, dtype=torch.float64) * 2 - 1) / hidden**0.5

    norms = (1 + 0.3 * randn(6, hidden), 0.3 * randn(6, hidden)) if layer_norm else (None, None)
    sample = Problem(
        randn(steps, batch, input),
        randn(batch, context),
        Weights(
            weight(hidden, input),
            weight(hidden, context),
            weight(hidden, 2 * hidden),
            weight(hidden, hidden),
            weight(hidden, hidden),
            weight(hidden, hidden),
            *norms,
        ),
        randn(batch, hidden),
        torch.randint(1, steps + 1, (batch,)) if lengths else None,
        randn(steps, batch, hidden),
        randn(batch, hidden),
    )
    return sample if dtype is None else sample.to(dtype)


def with_gradients(function, p: Problem) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """output, h_n and every gradient of function(input, context, weights, hx, lengths)."""
    named = {name: x.detach().requires_grad_() for name, x in p.operands().items()}
    weights = Weights(*(named.get(name) for name in Weights._fields))
    output, h_n = function(named["input"], named["context"], weights, named["hx"], p.lengths)
    grads = torch.autograd.grad((output, h_n), list(named.values()), (p.grad_output, p.grad_h_n))
    results = {"output": output.detach(), "h_n": h_n.detach()}
    results.update((f"grad {name}", grad) for name, grad in zip(named, grads, strict=True))
    return results


def reference_results(p: Problem, mix: str = "gated") -> dict[str, Tensor]:
    """The reference in float64 on the (already rounded) values of p."""

    def run(input, context, weights, hx, lengths):  # type: ignore[no-untyped-def]
        return reference.mcu(input, context, weights, hx, lengths, mix=mix)

    return with_gradients(run, p.to(torch.float64))


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """||x - truth|| / ||truth|| of each result; absolute where the truth is zero to 1e-12."""
    errors = {}
    for name, x in results.items():
        norm = truth[name].norm()
        difference = (x.double() - truth[name]).norm()
        errors[name] = float(difference / norm if norm > 1e-12 else difference)
    return errors
