"""FusedMCU on a CPU beside the primitives that other runtimes have, called without torch."""

from __future__ import annotations

import primitives
import problems
import pytest
import torch
from conftest import Compare
from problems import Size

from mmixer_kernels.comparison.passes import PASSES

CPU = torch.device("cpu")
SIZES = [
    Size(64, 8, 512),
    Size(16, 8, 512),
    Size(37, 5, 384),
    Size(100, 16, 320),
    Size(64, 8, 32),
    Size(64, 8, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_fused_mcu(compare: Compare, size: Size, passes: str, threads: int) -> None:
    error = problems.check_sequence(size, "cpu", CPU, threads)
    ours, _, *layers = problems.sequence_contenders(size, passes, "cpu", CPU)
    others, missing = primitives.baselines(size, passes)
    compare(
        f"FusedMCU beside other runtimes' primitives, {passes}",
        str(size),
        [ours, *layers, *others],
        threads=threads,
        error=error,
        multiply_adds=primitives.multiply_adds(size),
        missing=missing,
    )


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_prepacked_mcu(compare: Compare, size: Size, threads: int) -> None:
    """Weights are packed outside of what is timed, as those of oneDNN's primitives are."""
    error = problems.check_prepacked(size, CPU, threads)
    fused, _, *layers = problems.sequence_contenders(size, "forward", "cpu", CPU)
    others, missing = primitives.baselines(size, "forward")
    compare(
        "PrepackedMCU beside other runtimes' primitives, forward",
        str(size),
        [problems.prepacked_contender(size, CPU), fused, *layers, *others],
        threads=threads,
        error=error,
        multiply_adds=primitives.multiply_adds(size),
        missing=missing,
    )
