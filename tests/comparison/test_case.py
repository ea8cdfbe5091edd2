"""The case that a comparison is of."""

from __future__ import annotations

import pytest
import torch

from mmixer_kernels import FusedMCU, FusedMCUCell
from mmixer_kernels.comparison import Case


def test_sizes_that_are_not_given_are_the_hidden_size() -> None:
    case = Case(3, 2, 8)
    assert (case.F, case.C) == (8, 8)
    assert [tuple(x.shape) for x in case.operands] == [(3, 2, 8), (2, 8)]
    case = Case(3, 2, 8, 5, 0)
    assert (case.F, case.C) == (5, 0)
    assert [tuple(x.shape) for x in case.operands] == [(3, 2, 5)]
    case.unit(*case.operands)


def test_the_case_of_a_call() -> None:
    unit = FusedMCU(4, 3, 8, engine="cpu", dtype=torch.float64)
    input = torch.randn(5, 2, 4, dtype=torch.float64)
    expected = Case(5, 2, 8, 4, 3, torch.float64, torch.device("cpu"), "cpu")
    assert Case.of(unit, input) == expected
    unit.batch_first = True
    assert Case.of(unit, input.transpose(0, 1)) == expected


def test_what_is_no_case() -> None:
    with pytest.raises(ValueError, match="steps"):
        Case(0, 2, 8)
    with pytest.raises(ValueError, match="context_size"):
        Case(1, 2, 8, 4, -1)
    with pytest.raises(TypeError, match="dtype"):
        Case(dtype=torch.int32)
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        Case(device=torch.device("meta"))
    with pytest.raises(TypeError, match="unit must be a FusedMCU, but is a FusedMCUCell"):
        Case.of(FusedMCUCell(4, 0, 8), torch.randn(1, 1, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="three dimensions, but has 2"):
        Case.of(FusedMCU(4, 0, 8), torch.randn(5, 4))


def test_products_are_never_narrower_than_the_engine_s() -> None:
    assert Case(dtype=torch.bfloat16).compute_dtype is torch.float32
    assert Case(dtype=torch.float64).compute_dtype is torch.float64
    assert Case(dtype=torch.bfloat16, device=torch.device("cuda")).compute_dtype is torch.bfloat16
