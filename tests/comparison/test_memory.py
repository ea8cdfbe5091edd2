"""The bytes that a forward keeps for its backward."""

from __future__ import annotations

import torch

from mmixer_kernels import FusedMCU
from mmixer_kernels.comparison.memory import saved_bytes
from mmixer_kernels.engines import cpu
from mmixer_kernels.problem import Problem


def test_a_storage_counts_once_and_whole_and_what_was_there_does_not() -> None:
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)

    def call() -> list[torch.Tensor]:
        product = x * w  # keeps x and w
        return [product[:1].sin(), product[1:].sin()]  # keep views of the product

    assert saved_bytes(call, [x, w]) == 4 * 24
    assert saved_bytes(call, [x]) == 4 * 24 * 2
    assert saved_bytes(call, []) == 4 * 24 * 3


def test_a_unit_keeps_what_its_engine_says() -> None:
    input, context = torch.randn(5, 2, 4, requires_grad=True), torch.randn(2, 3)
    kept = {}
    for recompute in (False, True):
        unit = FusedMCU(4, 3, 16, engine="cpu", recompute=recompute)
        apart = [input, context, *unit.parameters()]
        kept[recompute] = saved_bytes(lambda unit=unit: unit(input, context), apart)  # type: ignore[misc]
    problem = Problem([input], [context], [unit.weights()])
    assert kept[False] == 4 * cpu.saved_size(problem, "gates")
    assert kept[True] == 4 * cpu.saved_size(problem, "states") == 4 * 5 * 2 * 16
