"""The launches of a call of the CUDA engine, counted by csrc/emulator and not run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import emulation
import pytest
import torch
from torch import Tensor

from mmixer_kernels import FusedMCU
from mmixer_kernels.engines import cuda
from mmixer_kernels.functional import mcu_group

STEPS, BATCH, HIDDEN = 3, 2, 16


@pytest.fixture
def counting(emulator: ModuleType) -> ModuleType:
    emulator.configure(run=False)
    return emulator


def group_call(
    groups: int, dtype: torch.dtype
) -> tuple[Callable[[], tuple[Tensor, Tensor]], list[Tensor]]:
    """A call of so many weight sets of equal sizes, and all that has a gradient."""
    units = [FusedMCU(HIDDEN, HIDDEN, HIDDEN, dtype=dtype) for _ in range(groups)]
    inputs = [torch.randn(STEPS, BATCH, HIDDEN, dtype=dtype) for _ in range(groups)]
    contexts = [torch.randn(BATCH, HIDDEN, dtype=dtype) for _ in range(groups)]
    weights = [unit.weights() for unit in units]
    leaves = [x.requires_grad_() for x in (*inputs, *contexts)]
    leaves += [x for unit in units for x in unit.parameters()]
    return lambda: mcu_group(inputs, contexts, weights, engine="cuda"), leaves


def test_what_is_counted_does_not_run(counting: ModuleType) -> None:
    call, _ = group_call(1, torch.float32)
    with torch.no_grad():
        counting.clear_launches()
        assert call()[0].isnan().all()  # as fresh memory is
        assert counting.launches()["Forward"] == 1
        counting.configure()
        assert call()[0].isfinite().all()
    assert counting.launches()["Forward"] == 2


def test_operators_of_torch_are_launches(counting: ModuleType) -> None:
    x = torch.randn(3, 4)

    def call() -> None:
        torch.empty(5).view(1, 5), x.to(x.dtype).T.reshape(12)[2:]  # a copy, by reshape
        x @ x.T

    assert emulation.launches(counting, call) == {"aten::copy_": 1, "aten::mm": 1}


@pytest.mark.parametrize("path", ["cluster", "cooperative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("groups", "forward", "both"), [(1, 9, 30), (3, 12, 40)])
def test_launches_of_a_pass(
    counting: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    dtype: torch.dtype,
    groups: int,
    forward: int,
    both: int,
) -> None:
    monkeypatch.setattr(cuda, "PATHS", (path,))
    call, leaves = group_call(groups, dtype)

    sizes = (groups, STEPS, BATCH, HIDDEN), (groups, BATCH, HIDDEN)
    directions = [torch.ones(size, dtype=dtype) for size in sizes]

    def call_and_backward() -> None:
        torch.autograd.grad(call(), leaves, directions)

    for most, passes in (
        (forward, torch.no_grad()(call)),
        (forward, call),
        (both, call_and_backward),
    ):
        launched = emulation.launches(counting, passes)
        assert launched["Forward"] == 1
        assert sum(launched.values()) <= most, launched
