"""The products of a call, and the same alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmixer_kernels.comparison.case import Case
from mmixer_kernels.comparison.products import Product, Products, alone


@pytest.mark.parametrize("context_size", [0, 7])
def test_operations_are_those_that_torch_counts(context_size: int) -> None:
    case = Case(5, 3, 16, 4, context_size)
    with FlopCounterMode(display=False) as counter:
        output, _ = case.unit(*case.operands)
        assert counter.get_total_flops() == Products.of(case, backward=False).operations
        output.sum().backward()
    assert counter.get_total_flops() == Products.of(case, backward=True).operations


def test_products_alone_are_made_so_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: made.append((*a.shape, b.shape[1], tuple(out.shape)))
    )
    alone([Product(2, 3, 5), Product(1, 3, 4)], 2, Case(4, 2, 8))()
    assert made == [(2, 3, 5, (2, 5)), (1, 3, 4, (1, 4))] * 2
