from __future__ import annotations

import pytest
import torch

from mmixer_kernels import CellStream, FusedMCUCell

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CELL = FusedMCUCell(5, 7, 9)
FRAMES, CONTEXT, HX = torch.randn(4, 2, 5), torch.randn(2, 7), torch.randn(2, 9)


def steps(context: torch.Tensor, hx: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        for frame in FRAMES:
            hx = CELL(frame, context, hx)
    assert hx is not None
    return hx


@pytest.mark.parametrize("hx", [None, HX])
def test_a_stream_is_the_cell_step_by_step(hx: torch.Tensor | None) -> None:
    stream = CellStream(CELL, CONTEXT, hx)
    for frame in FRAMES:
        state = stream(frame)
    assert torch.equal(state, steps(CONTEXT, hx))
    assert torch.equal(stream.state, state)
    assert not state.requires_grad


def test_another_sequence() -> None:
    stream = CellStream(CELL, CONTEXT)
    kept = stream(FRAMES[0])
    before = stream.state
    other = torch.randn(2, 7)
    stream.reset(other, HX)
    for frame in FRAMES:
        state = stream(frame)
    assert torch.equal(state, steps(other, HX))
    assert kept is state
    assert not torch.equal(before, state)
    stream.reset()
    for frame in FRAMES:
        state = stream(frame)
    assert torch.equal(state, steps(other, None))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"context must be \[B, context_size\].*\[7\]"):
        CellStream(CELL, CONTEXT[0])
    with pytest.raises(ValueError, match="context"):
        CellStream(CELL, torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"hx must be \[2, 9\] torch.float32.*\[3, 9\]"):
        CellStream(CELL, CONTEXT, torch.zeros(3, 9))
    stream = CellStream(CELL, CONTEXT)
    with pytest.raises(ValueError, match=r"input must be \[2, 5\].*\[1, 5\]"):
        stream(FRAMES[0, :1])
    with pytest.raises(ValueError, match=r"input must be .*float32, but is .*float64"):
        stream(FRAMES[0].double())
    with pytest.raises(ValueError, match="input must be on cpu, but is on meta"):
        stream(FRAMES[0].to("meta"))


def test_no_samples() -> None:
    cell = FusedMCUCell(5, 7, 9, engine="reference")
    assert CellStream(cell, CONTEXT[:0])(FRAMES[0, :0]).shape == (0, 9)
