"""The passes: what is recorded, and which gradients are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmixer_kernels import FusedMCU
from mmixer_kernels.comparison.passes import FORWARD, FORWARD_BACKWARD, RECORDED, contender

Module = nn.Module


def operands(count: int) -> list[Tensor]:
    return [torch.randn(*shape, requires_grad=True) for shape in ((3, 2, 4), (2, 5))[:count]]


@pytest.mark.parametrize(("module", "count"), [(FusedMCU(4, 5, 8), 2), (nn.GRU(4, 8), 1)])
def test_a_backward_makes_every_gradient(
    module: Module, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[Any]] = []
    grad = torch.autograd.grad

    def recorded(outputs: Any, inputs: Sequence[Tensor], *others: Any) -> Any:
        made.append((inputs, grad(outputs, inputs, *others)))
        return made[-1][1]

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    given = operands(count)
    contender("unit", module, given, FORWARD_BACKWARD).call()
    ((inputs, grads),) = made
    assert {id(x) for x in inputs} == {id(x) for x in (*given, *module.parameters())}
    assert all(x.abs().sum() > 0 for x in grads)


def test_only_a_forward_alone_records_nothing() -> None:
    seen = []
    for passes in (FORWARD, RECORDED, FORWARD_BACKWARD):

        def module(x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return 2 * x

        contender("unit", module, operands(1), passes).call()
    assert seen == [False, True, True]
