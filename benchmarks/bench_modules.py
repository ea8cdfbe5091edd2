"""FusedMCU and FusedMCUCell on a CPU beside eager PyTorch and torch's own recurrent layers."""

from __future__ import annotations

import problems
import pytest
import torch
from conftest import Compare
from problems import Size, StackForm

from mmixer_kernels.comparison.passes import PASSES

CPU = torch.device("cpu")
SIZES = [
    Size(64, 8, 512),
    Size(16, 8, 512),
    Size(64, 32, 512),
    Size(256, 1, 256),
    Size(37, 5, 384),
    Size(100, 16, 320),
    Size(64, 7, 500),
    Size(8, 8, 64),
    Size(8, 8, 128),
    Size(16, 8, 128),
]
STACKS = {
    "one layer": StackForm(),
    "both directions": StackForm(bidirectional=True),
    "two layers": StackForm(num_layers=2),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_fused_mcu(compare: Compare, size: Size, passes: str, threads: int) -> None:
    error = problems.check_sequence(size, "cpu", CPU, threads)
    contenders = problems.sequence_contenders(size, passes, "cpu", CPU)
    compare(f"FusedMCU, {passes}", str(size), contenders, threads=threads, error=error)


@pytest.mark.parametrize("size", [Size(64, 8, 512), Size(16, 32, 256)], ids=str)
@pytest.mark.parametrize("form", STACKS)
@pytest.mark.parametrize("passes", PASSES)
def test_stack_without_context(
    compare: Compare, size: Size, form: str, passes: str, threads: int
) -> None:
    error = problems.check_stack(size, STACKS[form], "cpu", CPU, threads)
    contenders = problems.stack_contenders(size, STACKS[form], passes, "cpu", CPU)
    table = f"FusedMCUStack without context, {form}, {passes}"
    compare(table, str(size), contenders, threads=threads, error=error)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_streaming_cell(compare: Compare, weights: str, threads: int) -> None:
    """One step with float32 features and states, the weights in float32 or bfloat16."""
    size, dtype = Size(1, 1, 512), getattr(torch, weights)
    error = problems.check_cell(size, "cpu", CPU, threads, dtype)
    contenders = problems.cell_contenders(size, "forward", "cpu", CPU, dtype)
    table = f"FusedMCUCell, one step, {weights} weights"
    compare(table, str(size), contenders, threads=threads, error=error)


@pytest.mark.parametrize("weights", problems.STREAMED)
def test_cell_stream(compare: Compare, weights: str, threads: int) -> None:
    """Steps of a stream, whose context stays, with float32 features and states."""
    size = Size(1, 1, 512)
    error = problems.check_stream(size, CPU, threads, weights)
    contenders = problems.stream_contenders(size, CPU, weights)
    table = f"CellStream, one step, {weights} weights"
    compare(table, str(size), contenders, threads=threads, error=error)
