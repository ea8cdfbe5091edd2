"""Calls that nothing looks on at: the results are the dispatcher's, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmixer_kernels import FusedMCU, dispatch, plain
from mmixer_kernels.functional import mcu, mcu_cell, mcu_group

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
T, B, F, C, H = 3, 2, 4, 5, 6
UNITS = [FusedMCU(F, C, H, dtype=torch.float64) for _ in range(2)]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def sequence(batch_first: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    def call(x: Tensor, context: Tensor, hx: Tensor) -> Any:
        return mcu(x, context, UNITS[0].weights(), hx, batch_first=batch_first)

    return call, [leaf(*((B, T, F) if batch_first else (T, B, F))), leaf(B, C), leaf(1, B, H)]


def group(batch_first: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    weights = [unit.weights() for unit in UNITS]
    lengths = torch.tensor([T, 1])

    def call(x: Tensor, y: Tensor, *contexts: Tensor) -> Any:
        return mcu_group([x, y], contexts, weights, None, lengths, batch_first=batch_first)

    shape = (B, T, F) if batch_first else (T, B, F)
    return call, [leaf(*shape), leaf(*shape), leaf(B, C), leaf(B, C)]


def step(with_hx: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    def call(x: Tensor, context: Tensor, *hx: Tensor) -> Any:
        return (mcu_cell(x, context, UNITS[0].weights(), *hx),)

    return call, [leaf(B, F), leaf(B, C), *([leaf(B, H)] if with_hx else [])]


KINDS = {
    "sequence": lambda: sequence(False),
    "sequence, batch first": lambda: sequence(True),
    "group": lambda: group(False),
    "group, batch first": lambda: group(True),
    "step": lambda: step(True),
    "step without hx": lambda: step(False),
}


def derivatives(results: Any, operands: list[Tensor], order: int) -> list[Tensor]:
    """The results, and their gradients up to an order, of operands and weights."""
    wanted = [*operands, *(x for unit in UNITS for x in unit.parameters())]
    found = [x.detach() for x in results]
    value = sum(x.square().sum() for x in results)
    for i in range(order):
        graph = i + 1 < order
        grads = torch.autograd.grad(value, wanted, create_graph=graph, allow_unused=True)
        grads = [x for x in grads if x is not None]
        found += [x.detach() for x in grads]
        value = sum(x.square().sum() for x in grads)
    return found


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_dispatched_calls_have_equal_bits(
    kind: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, operands = KINDS[kind]()
    found = derivatives(call(*operands), operands, order)
    with torch.no_grad():
        alone = call(*operands)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "plain", lambda tensors: None)
        expected = derivatives(call(*operands), operands, order)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, alone, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_call_is_one_node_and_passes_the_dispatcher_by(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("the call was looked at more closely")

    for name in ("run", "run_step"):
        monkeypatch.setattr(f"mmixer_kernels.ops.{name}", refuse)
    monkeypatch.setattr(plain, "_by_ops", refuse)
    call, operands = KINDS[kind]()
    output = call(*operands)[0]
    assert type(output.grad_fn).__name__ == "_RecurrenceBackward"
    assert not output._is_view()
    leaves = [x for x, _ in output.grad_fn.next_functions if x is not None]
    assert {type(x).__name__ for x in leaves} == {"AccumulateGrad"}
    output.mul_(2).sum().backward()  # A result may be changed in place.
    assert all(x.grad is not None and x.grad.isfinite().all() for x in operands)


@pytest.mark.parametrize("first", ["inputs", "weights", "context"])
def test_only_what_is_needed_is_computed(first: str) -> None:
    """Each gradient is the same to the bit as where all are needed."""
    call, operands = sequence(True)
    everything = derivatives(call(*operands), operands, 1)
    x, context, hx = operands
    unit = UNITS[0]
    wanted = {"inputs": [x], "weights": list(unit.parameters()), "context": [context, hx]}[first]
    with torch.no_grad():
        fixed = [y if any(y is z for z in wanted) else y.detach() for y in operands]
    unit.requires_grad_(first == "weights")
    results = call(*fixed)
    grads = torch.autograd.grad(sum(y.square().sum() for y in results), wanted)
    unit.requires_grad_(True)
    for grad in grads:
        assert any(grad.shape == y.shape and torch.equal(grad, y) for y in everything)
