"""Problems, and how far a result is from the float64 reference."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from mmixer_kernels import reference
from mmixer_kernels.engines import cuda
from mmixer_kernels.functional import mcu
from mmixer_kernels.problem import Problem as Call
from mmixer_kernels.problem import Weights


class Size(NamedTuple):
    steps: int
    batch: int
    input: int
    context: int  # 0: without context
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
    context: Tensor | None
    weights: Weights
    hx: Tensor | None  # `[B, H]`; of both directions `[2, B, H]`, as h_n
    lengths: Tensor | None
    grad_output: Tensor
    grad_h_n: Tensor
    weights_reverse: Weights | None = None  # of the other direction, where there is one

    def operands(self) -> dict[str, Tensor]:
        named = {"input": self.input, "context": self.context, "hx": self.hx}
        named |= self.weights._asdict()
        if self.weights_reverse is not None:
            named |= {f"{k}_reverse": v for k, v in self.weights_reverse._asdict().items()}
        return {k: v for k, v in named.items() if v is not None}

    def call(self, mix: str = "gated") -> Call:
        """The same as an engine takes it."""
        contexts = [] if self.context is None else [self.context]
        if self.weights_reverse is not None:
            sets = [self.weights, self.weights_reverse]
            both = [self.input] * 2, contexts * 2, sets, self.hx, self.lengths
            return Call(*both, mix, bidirectional=True)
        hx = None if self.hx is None else self.hx[None]
        return Call([self.input], contexts, [self.weights], hx, self.lengths, mix)

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with the function applied to each tensor but lengths."""
        mapped = {}
        for name, value in self._asdict().items():
            if isinstance(value, Weights):
                mapped[name] = value.map(function)
            elif value is not None and name != "lengths":
                mapped[name] = function(value)
        return self._replace(**mapped)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values, rounded to dtype."""
        return self.map(lambda x: x.to(dtype))

    def on(self, device: str) -> Problem:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return self.map(lambda x: x.to(device))._replace(lengths=lengths)

    def strided(self) -> Problem:
        """The same values, every second element of memory that is otherwise NaN."""

        def spread(x: Tensor) -> Tensor:
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
            wide[..., ::2] = x
            return wide[..., ::2]

        return self.map(spread)

    def expanded(self) -> Problem:
        """One value for all samples, and one gradient for all of the output."""
        return self._replace(
            input=self.input[:1, :1].expand_as(self.input),
            context=None if self.context is None else self.context[:1].expand_as(self.context),
            hx=self.hx[..., :1, :1].expand_as(self.hx),
            grad_output=self.grad_output.new_ones(()).expand_as(self.grad_output),
            grad_h_n=self.grad_h_n.new_zeros(()).expand_as(self.grad_h_n),
        )


def problem(
    size: Size,
    *,
    layer_norm: bool = True,
    lengths: bool = False,
    bidirectional: bool = False,
    dtype: torch.dtype | None = None,
) -> Problem:
    steps, batch, input, context, hidden = size
    directions = (2,) if bidirectional else ()

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def weight(*shape: int) -> Tensor:
        return (torch.rand(shape, dtype=torch.float64) * 2 - 1) / hidden**0.5

    rows = 6 if context else 4
    norms = (None, None)
    if layer_norm:
        norms = 1 + 0.3 * randn(rows, hidden), 0.3 * randn(rows, hidden)
    sample = Problem(
        randn(steps, batch, input),
        randn(batch, context) if context else None,
        Weights(
            weight(hidden, input),
            weight(hidden, context) if context else None,
            weight(hidden, 2 * hidden) if context else None,
            weight(hidden, hidden),
            weight(hidden, hidden),
            weight(hidden, hidden),
            *norms,
        ),
        randn(*directions, batch, hidden),
        torch.randint(1, steps + 1, (batch,)) if lengths else None,
        randn(steps, batch, 2 * hidden if bidirectional else hidden),
        randn(*directions, batch, hidden),
        problem(size, layer_norm=layer_norm).weights if bidirectional else None,
    )
    return sample if dtype is None else sample.to(dtype)


def run(engine: str, mix: str = "gated", batch_first: bool = False, recompute: bool = False):  # type: ignore[no-untyped-def]
    """The engine with `exact`'s shapes of hx and h_n."""

    def function(input, context, weights, hx, lengths):  # type: ignore[no-untyped-def]
        one = isinstance(weights, Weights)
        output, h_n = mcu(
            input.transpose(0, 1) if batch_first else input,
            context,
            weights,
            hx[None] if one and hx is not None else hx,
            lengths,
            mix=mix,
            batch_first=batch_first,
            engine=engine,
            recompute=recompute,
        )
        return (output.transpose(0, 1) if batch_first else output), h_n[0] if one else h_n

    return function


def exact(input, context, weights, hx, lengths, mix="gated"):  # type: ignore[no-untyped-def]
    """`reference.mcu`, or of two weight sets both directions as `mcu` returns them."""
    if isinstance(weights, Weights):
        return reference.mcu(input, context, weights, hx, lengths, mix=mix)
    states = [None, None] if hx is None else hx
    results = [
        reference.mcu(input, context, w, h, lengths, mix=mix, reverse=reverse)
        for w, h, reverse in zip(weights, states, (False, True), strict=True)
    ]
    outputs, last = zip(*results, strict=True)
    return torch.cat(outputs, dim=-1), torch.stack(last)


def op_operands(  # type: ignore[no-untyped-def]
    groups=1,
    hx=True,
    lengths=True,
    layer_norm=True,
    device="cpu",
    context=True,
    bidirectional=False,
):
    """Arguments of mcu_forward up to bidirectional, and gradients of output and h_n, in float64."""
    size = Size(2, 2, 2, 3 if context else 0, 3)
    problems = [problem(size, layer_norm=layer_norm).on(device) for _ in range(groups)]
    arguments = (
        [p.input.requires_grad_() for p in problems],
        [p.context.requires_grad_() for p in problems if p.context is not None],
        [x.requires_grad_() for p in problems for x in p.weights.tensors()],
        torch.stack([p.hx for p in problems]).requires_grad_() if hx else None,
        torch.randint(1, size.steps + 1, (size.batch,)).to(device) if lengths else None,
        "gated",
        1e-5,
        bidirectional,
    )
    grads = (
        torch.stack([p.grad_output for p in problems]),
        torch.stack([p.grad_h_n for p in problems]),
    )
    return arguments, grads


def forget_cuda_calls() -> None:
    """Everything that the CUDA engine keeps between calls."""
    cuda._native_plan.cache_clear()
    cuda._way.cache_clear()
    cuda._cell_plan.cache_clear()
    cuda._workspaces.clear()
    cuda._told_devices.clear()
    cuda._told_products.clear()


def with_gradients(function, p: Problem) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """output, h_n and every gradient of function(input, context, weights, hx, lengths)."""
    named = {name: x.detach().requires_grad_() for name, x in p.operands().items()}
    weights = Weights(*(named.get(name) for name in Weights._fields))
    if p.weights_reverse is not None:
        reverse = (named.get(f"{name}_reverse") for name in Weights._fields)
        weights = weights, Weights(*reverse)
    context, hx = named.get("context"), named.get("hx")
    output, h_n = function(named["input"], context, weights, hx, p.lengths)
    grads = torch.autograd.grad((output, h_n), list(named.values()), (p.grad_output, p.grad_h_n))
    results = {"output": output.detach(), "h_n": h_n.detach()}
    results.update((f"grad {name}", grad) for name, grad in zip(named, grads, strict=True))
    return results


def reference_results(p: Problem, mix: str = "gated") -> dict[str, Tensor]:
    """The reference in float64 on the (already rounded) values of p, computed once for equal ones:
    engines, paths and instruction sets are tested on the same.

    In one thread: of many tiny operations the threads would wait for whichever processor is busy.
    """
    p = p.to(torch.float64)
    key = _fingerprint(p, mix)
    if key not in _truths:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _truths[key] = with_gradients(partial(exact, mix=mix), p)
        finally:
            torch.set_num_threads(threads)
    return dict(_truths[key])


_truths: dict[bytes, dict[str, Tensor]] = {}


def _fingerprint(p: Problem, mix: str) -> bytes:
    """Equal for equal values and shapes."""
    digest = hashlib.sha256(mix.encode())
    for x in chain.from_iterable(x if isinstance(x, Weights) else [x] for x in p):
        digest.update(str(None if x is None else x.shape).encode())
        if x is not None:
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """||x - truth|| / ||truth|| of each result; absolute where the truth is zero to 1e-12, and
    infinite, which no bound lets pass, where it is no number."""
    errors = {}
    for name, x in results.items():
        norm = truth[name].norm()
        difference = (x.to(truth[name]) - truth[name]).norm()
        error = float(difference / norm if norm > 1e-12 else difference)
        errors[name] = math.inf if math.isnan(error) else error
    return errors
