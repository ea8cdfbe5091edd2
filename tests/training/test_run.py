from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmixer_kernels.errors import UserError
from mmixer_kernels.training.run import check_data

MOMENTS = {"a": ([3.0, -1e-9], [2.0, 1.0]), "b": ([1e6], [1e-3])}


def identity(**changes: Any) -> dict[str, Any]:
    return {"modalities": ["a", "b"], "moments": {**MOMENTS, **changes}}


@pytest.mark.parametrize(
    ("changes", "agree"),
    [
        ({}, True),
        ({"a": ([3.0 + 1e-14, -1.0001e-9], [2.0, 1.0 - 1e-15])}, True),
        ({"a": ([3.0, 1e-7], [2.0, 1.0])}, False),
        ({"a": ([3.0, -1e-9], [2.0, 1.0 + 1e-7])}, False),
        ({"b": ([1e6 + 1e-2], [1e-3])}, False),
    ],
)
def test_moments_of_a_data_set_agree_to_rounding(changes: dict[str, Any], agree: bool) -> None:
    """Sums of the same samples differ with the number of threads and with the processor."""
    saved, now = identity(), identity(**changes)
    if agree:
        check_data(saved, now, Path("best.pt"))
    else:
        with pytest.raises(UserError, match=r"not that of best\.pt: .* another mean or standard"):
            check_data(saved, now, Path("best.pt"))
    raw = {**saved, "moments": None}
    check_data(raw, raw, Path("best.pt"))
    with pytest.raises(UserError, match=r"another mean or standard"):
        check_data(raw, saved, Path("best.pt"))
