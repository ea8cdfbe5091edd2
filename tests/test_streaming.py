from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell, FusedMCUStack, functional

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CELL, BARE = FusedMCUCell(5, 7, 9), FusedMCUCell(5, 0, 9)
FRAMES, CONTEXT, HX = torch.randn(4, 2, 5), torch.randn(2, 7), torch.randn(2, 9)


def steps(cell: FusedMCUCell, context: Tensor | None, hx: Tensor | None) -> Tensor:
    with torch.no_grad():
        for frame in FRAMES:
            hx = cell(frame, context, hx)
    assert hx is not None
    return hx


def streamed(stream: CellStream, frames: Tensor = FRAMES) -> Tensor:
    """The stream's results, one after another."""
    return torch.stack([stream(frame).clone() for frame in frames])


@pytest.mark.parametrize("hx", [None, HX])
@pytest.mark.parametrize(("cell", "context"), [(CELL, CONTEXT), (BARE, None)])
def test_a_stream_is_the_cell_step_by_step(
    cell: FusedMCUCell, context: Tensor | None, hx: Tensor | None
) -> None:
    stream = CellStream(cell, context, hx, batch_size=2)
    for frame in FRAMES:
        state = stream(frame)
    assert torch.equal(state, steps(cell, context, hx))
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
    assert torch.equal(state, steps(CELL, other, HX))
    assert kept is state
    assert not torch.equal(before, state)
    stream.reset()
    for frame in FRAMES:
        state = stream(frame)
    assert torch.equal(state, steps(CELL, other, None))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_stream_of_a_stack_is_its_sequence(
    layers: int, context: Tensor | None, batch_first: bool, engine: str
) -> None:
    size = 0 if context is None else 7
    options = {"batch_first": batch_first, "engine": engine}
    stack = FusedMCUStack(5, size, 9, layers, dropout=0.5 if layers > 1 else 0.0, **options).eval()
    hx = torch.randn(layers, 2, 9)
    stream = CellStream(stack, context, batch_size=2)
    for state in (None, hx):
        stream.reset(hx=state)
        sequence = FRAMES.transpose(0, 1) if batch_first else FRAMES
        output, h_n = stack(sequence, context, state)
        output = output.transpose(0, 1) if batch_first else output
        torch.testing.assert_close(streamed(stream), output.detach())
        torch.testing.assert_close(stream.state, h_n.detach())
    assert torch.equal(streamed(CellStream(stack, context, hx)), streamed(_reset(stream, hx)))


def _reset(stream: CellStream, hx: Tensor) -> CellStream:
    stream.reset(hx=hx)
    return stream


def test_hooks_and_parametrizations_of_a_stack_take_part() -> None:
    stack = FusedMCUStack(5, 0, 9, 2)
    prune.l1_unstructured(stack, "weight_r_l1", 0.5)  # which a hook applies before forward
    torch.nn.utils.parametrizations.weight_norm(stack, "weight_z_l0")
    stream = CellStream(stack, batch_size=2)
    with torch.no_grad():
        stack.weight_r_l1_orig.mul_(2)
        stack.parametrizations.weight_z_l0.original0.mul_(2)
        torch.testing.assert_close(streamed(stream), stack(FRAMES)[0])
    stack.register_forward_hook(lambda module, arguments, results: (results[0], 2 * results[1]))
    stream.reset()
    torch.testing.assert_close(stream(FRAMES[0]), stack(FRAMES[:1])[1][-1].detach())


@pytest.mark.filterwarnings("ignore")  # of torch's tracer
def test_a_step_of_a_stack_is_a_sequence_of_one() -> None:
    """Without gradients it takes the engines' shorter way; no result shares another's memory."""
    for options in ({}, {"num_layers": 2}, {"batch_first": True}, {"bidirectional": True}):
        stack = FusedMCUStack(5, 7, 9, **options)
        count = stack.num_layers * (1 + stack.bidirectional)
        frames = FRAMES[:1].transpose(0, 1) if stack.batch_first else FRAMES[:1]
        for hx in (None, torch.randn(count, 2, 9)):
            expected = [x.detach() for x in stack(frames, CONTEXT, hx)]
            with torch.no_grad():
                output, h_n = stack(frames, CONTEXT, hx)
            torch.testing.assert_close([output, h_n], expected)
            output.zero_()
            torch.testing.assert_close(h_n, expected[1])
    stack = FusedMCUStack(5, 7, 9, 2)
    with torch.no_grad():
        traced = torch.jit.trace(stack, (FRAMES[:1], CONTEXT))
        torch.testing.assert_close(traced(FRAMES, CONTEXT), stack(FRAMES, CONTEXT))
        with pytest.raises(ValueError, match=r"context must be \[B, context_size\]"):
            stack(FRAMES[:1], CONTEXT[None])
        with pytest.raises(ValueError, match=r"lengths must be in 1\.\.1"):
            stack(FRAMES[:1], CONTEXT, lengths=torch.tensor([1, 2]))


def test_a_stream_of_a_stack_takes_the_engines_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "mcu")
    assert CellStream(FusedMCUStack(5, 0, 9, 2))(FRAMES[0, :1]).shape == (1, 9)


@pytest.mark.parametrize("cell", [BARE, FusedMCUStack(5, 0, 9, 2)])
def test_the_batch_size_and_dtype_of_a_stream_without_context(
    cell: FusedMCUCell | FusedMCUStack,
) -> None:
    layers = () if isinstance(cell, FusedMCUCell) else (2,)
    assert CellStream(cell)(FRAMES[0, :1]).shape == (1, 9)
    assert CellStream(cell, batch_size=3).state.shape == (*layers, 3, 9)
    assert CellStream(cell, hx=torch.zeros(*layers, 4, 9)).state.shape == (*layers, 4, 9)
    narrow = copy.deepcopy(cell).bfloat16()
    assert CellStream(narrow)(FRAMES[0, :1].bfloat16()).dtype == torch.bfloat16
    wide = CellStream(narrow, hx=torch.zeros(*layers, 2, 9))
    assert wide(FRAMES[0]).dtype == torch.float32
    with pytest.raises(ValueError, match="without either batch_size and the parameters' dtype"):
        CellStream(narrow)(FRAMES[0, :1])


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
    with pytest.raises(TypeError, match="context must be a Tensor, but is a NoneType"):
        CellStream(CELL)
    for call in (lambda: CellStream(BARE, CONTEXT), lambda: CellStream(BARE).reset(CONTEXT)):
        with pytest.raises(ValueError, match="context must be None, since this cell has none"):
            call()
    with pytest.raises(ValueError, match="batch_size must be context's, 2, but is 3"):
        CellStream(CELL, CONTEXT, batch_size=3)
    with pytest.raises(ValueError, match="batch_size must be hx's, 2, but is 3"):
        CellStream(BARE, hx=HX, batch_size=3)
    with pytest.raises(ValueError, match="batch_size must be a positive int, but is 0"):
        CellStream(BARE, batch_size=0)
    with pytest.raises(TypeError, match="a FusedMCUCell or a FusedMCUStack, but is a FusedMCU"):
        CellStream(FusedMCU(5, 7, 9), CONTEXT)
    stack = FusedMCUStack(5, 0, 9, 2, dropout=0.5)
    with pytest.raises(ValueError, match=r"hx must be \[2, 1, 9\].*\[1, 9\]"):
        CellStream(stack.eval(), hx=torch.zeros(1, 9))
    with pytest.raises(ValueError, match="hx must not require a gradient"):
        CellStream(stack, hx=torch.zeros(2, 1, 9, requires_grad=True))


def test_a_stack_that_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="cell must have one direction, but is bidirectional"):
        CellStream(FusedMCUStack(5, 0, 9, bidirectional=True))
    stack = FusedMCUStack(5, 0, 9, 2, dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout=0.5: call .eval\(\) first"):
        CellStream(stack)
    stream = CellStream(stack.eval())
    stack.train()
    with pytest.raises(ValueError, match="cell must be in eval mode"):
        stream(FRAMES[0, :1])


def test_no_samples() -> None:
    cell = FusedMCUCell(5, 7, 9, engine="reference")
    assert CellStream(cell, CONTEXT[:0])(FRAMES[0, :0]).shape == (0, 9)
