from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell, FusedMCUStack, functional
from mmixer_kernels.engines import cpu

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CELL, BARE = FusedMCUCell(5, 7, 9), FusedMCUCell(5, 0, 9)
FRAMES, CONTEXT, HX = torch.randn(4, 2, 5), torch.randn(2, 7), torch.randn(2, 9)


def steps(cell: FusedMCUCell, context: Tensor | None, hx: Tensor | None) -> Tensor:
    with torch.no_grad():
        for frame in FRAMES:
            hx = cell(frame, context, hx)
    assert hx is not None
    return hx


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A step that calls the cell fails from here on."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the cell was called")

    return lambda: monkeypatch.setattr(functional, "mcu_cell", refuse)


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
    with pytest.raises(
        TypeError, match=r"its quantized\(\), or a FusedMCUStack, but is a FusedMCU"
    ):
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


KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32": ({}, torch.float32),
    "float64": ({"mix": "concat", "dtype": torch.float64}, torch.float64),
    "bfloat16 weights": ({"dtype": torch.bfloat16}, torch.float32),
    "without norms": ({"layer_norm": False}, torch.float32),
    "without context": ({"context_size": 0, "eps": 1e-3}, torch.float32),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_direct_step_is_the_cells_to_the_bit(
    kind: str, layers: int, count: int, threads: None, direct: Callable[[], None]
) -> None:
    """H is that of a team of two."""
    options, dtype = KINDS[kind]
    sizes = {"input_size": 5, "context_size": 7, "hidden_size": 271, **options}
    cell: Any = FusedMCUStack(**sizes, num_layers=layers) if layers else FusedMCUCell(**sizes)
    frames = torch.randn(4, 1, 5, dtype=dtype)
    context = torch.randn(1, 7, dtype=dtype) if cell.context_size else None
    hx = torch.randn(*[layers] * bool(layers), 1, 271, dtype=dtype)
    stream = CellStream(cell, context, hx)
    torch.set_num_threads(count)
    expected, state = [], hx
    with torch.no_grad():
        for frame in frames:
            state = cell(frame[None], context, state)[1] if layers else cell(frame, context, state)
            expected.append(state[-1] if layers else state)
    direct()
    assert torch.equal(streamed(stream, frames), torch.stack(expected))
    assert torch.equal(stream.state, state)


def test_what_depends_on_the_context_is_kept() -> None:
    """A change that PyTorch does not count shows after a reset."""
    cell = copy.deepcopy(CELL)
    stream = CellStream(cell, CONTEXT)
    stream(FRAMES[0])
    with torch.no_grad():
        expected = cell(FRAMES[1], CONTEXT, stream.state)
    cell.weight_g.data.fill_(torch.nan)
    cell.weight_s.data[:, 9:] = torch.nan
    assert torch.equal(stream(FRAMES[1]), expected)
    stream.reset(hx=stream.state)
    assert stream(FRAMES[2]).isnan().all()


def _train(cell: FusedMCUCell) -> None:
    for parameter in cell.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(cell.parameters(), lr=0.1).step()
    cell.zero_grad()


def _assign(cell: FusedMCUCell) -> None:
    cell.norm_bias = nn.Parameter(cell.norm_bias + 1)


def _move(cell: FusedMCUCell) -> None:
    cell.weight_s.data = 2 * cell.weight_s.data


CHANGES: dict[str, Callable[[FusedMCUCell], Any]] = {
    "optimizer": _train,
    "load_state_dict": lambda cell: cell.load_state_dict(FusedMCUCell(5, 7, 9).state_dict()),
    "load_state_dict, assign": lambda cell: cell.load_state_dict(
        FusedMCUCell(5, 7, 9).state_dict(), assign=True
    ),
    "inference mode": torch.inference_mode()(lambda cell: cell.weight_g.mul_(2)),
    "detach": lambda cell: cell.weight_g.detach().mul_(2),
    ".data = ": _move,
    "another parameter": _assign,
    "eps": lambda cell: setattr(cell, "eps", 1.0),
    "mix": lambda cell: setattr(cell, "mix", "concat"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_follows_its_cell(change: str, direct: Callable[[], None]) -> None:
    cell = copy.deepcopy(CELL)
    stream = CellStream(cell, CONTEXT)
    stream(FRAMES[0])
    before = stream.state
    with torch.no_grad():
        old = cell(FRAMES[1], CONTEXT, before)
        CHANGES[change](cell)
        new = cell(FRAMES[1], CONTEXT, before)
    direct()
    assert torch.equal(stream(FRAMES[1]), new)
    assert not torch.equal(new, old)


def test_a_stream_follows_its_cell_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = copy.deepcopy(CELL)
    stream = CellStream(cell, CONTEXT)
    stream(FRAMES[0])
    before = stream.state
    with torch.no_grad():
        cell.weight_g.mul_(2)
        expected = cell(FRAMES[1], CONTEXT, before)

    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "stream", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream(FRAMES[1])
    assert torch.equal(stream.state, before)
    assert torch.equal(stream(FRAMES[1]), expected)


class _Doubled(FusedMCUCell):
    def forward(self, *operands: Any) -> Tensor:
        return 2 * super().forward(*operands)


class _Calls(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is functional.mcu_cell else result


def _hooked(cell: FusedMCUCell) -> Any:
    cell.register_forward_hook(lambda module, operands, result: 2 * result)


def _replaced(cell: FusedMCUCell) -> Any:
    forward = cell.forward
    cell.forward = lambda *operands: 2 * forward(*operands)  # type: ignore[method-assign]


def _of_subclass(cell: FusedMCUCell) -> Any:
    cell.__class__ = _Doubled


@pytest.mark.parametrize("look", [_hooked, _replaced, _of_subclass, lambda _: _Calls()])
def test_whoever_looks_on_at_the_cell_is_heard(look: Callable[[FusedMCUCell], Any]) -> None:
    cell = copy.deepcopy(CELL)
    stream = CellStream(cell, CONTEXT)
    first = stream(FRAMES[0]).clone()
    with torch.no_grad():
        expected = cell(FRAMES[1], CONTEXT, first)
    with look(cell) or nullcontext():
        assert torch.equal(stream(FRAMES[1]), 2 * expected)


@pytest.fixture
def global_hook() -> Iterator[list[Any]]:
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call))
    yield seen
    handle.remove()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears")
def test_tools_that_see_every_call(global_hook: list[Any]) -> None:
    stream = CellStream(CELL, CONTEXT)
    global_hook.clear()
    stream(FRAMES[0])
    assert len(global_hook) == 1
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = CELL(FRAMES[1], CONTEXT, stream.state)
        assert torch.equal(stream(FRAMES[1]), expected.float())
    with torch.profiler.profile() as profile:
        stream(FRAMES[2])
    assert "mmixer_kernels::mcu_forward" in {event.key for event in profile.key_averages()}


def test_another_number_of_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_stream(steps: Any, stream: Any = cpu.stream) -> Any:
        opened.append(torch.get_num_threads())
        return stream(steps)

    monkeypatch.setattr(cpu, "stream", open_stream)
    torch.set_num_threads(1)
    cell = FusedMCUCell(5, 7, 271)
    stream = CellStream(cell, CONTEXT[:1])
    expected = streamed(stream, FRAMES[:, :1])
    stream.reset()
    first = streamed(stream, FRAMES[:2, :1])
    torch.set_num_threads(2)
    assert torch.equal(torch.cat([first, streamed(stream, FRAMES[2:, :1])]), expected)
    assert opened == [1, 1, 2]  # when it was made, after the reset, and with two threads


def test_a_state_as_the_next_input(threads: None) -> None:
    torch.set_num_threads(2)
    for cell in (FusedMCUCell(271, 7, 271), FusedMCUStack(271, 7, 271, 2)):
        stream, copied = CellStream(cell, CONTEXT), CellStream(cell, CONTEXT)
        state = copied(torch.ones(2, 271))
        own = stream(torch.ones(2, 271))
        for _ in range(3):
            assert torch.equal(stream(own), copied(state.clone()))


def test_a_step_is_a_change_in_place() -> None:
    stream = CellStream(CELL, CONTEXT)
    weight = torch.randn(9, requires_grad=True)
    loss = (stream(FRAMES[0]) * weight).sum()
    stream(FRAMES[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(
    copied: Callable[[CellStream], CellStream], direct: Callable[[], None]
) -> None:
    stack = FusedMCUStack(5, 7, 9, 2)
    stream = CellStream(stack, CONTEXT)
    stream(FRAMES[0])
    other = copied(stream)
    direct()
    expected = streamed(stream, FRAMES[1:])
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert torch.equal(streamed(other, FRAMES[1:]), expected)
    assert torch.equal(other.state[-1], expected[-1])


def test_inference_mode() -> None:
    with torch.inference_mode():
        cell = copy.deepcopy(CELL)
        stream, of_inference = CellStream(CELL, CONTEXT), CellStream(cell, CONTEXT)
        for frame in FRAMES:
            assert torch.equal(stream(frame), of_inference(frame))
            cell.weight_g.add_(1)  # which PyTorch does not count
            assert not torch.equal(stream(frame), of_inference(frame))
            of_inference.cell = cell = copy.deepcopy(CELL)
            of_inference.reset(hx=stream.state)


def test_a_wrong_input_changes_nothing(direct: Callable[[], None]) -> None:
    stream = CellStream(CELL, CONTEXT)
    expected = streamed(stream)
    stream.reset()
    direct()
    for wrong in (FRAMES[0, :1], FRAMES[0, :, :4], FRAMES[0].double(), FRAMES[0].to("meta"), 1.0):
        with pytest.raises((TypeError, ValueError), match="input must be"):
            stream(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input must not require a gradient"):
        stream(FRAMES[0].clone().requires_grad_())
    spaced = torch.randn(4, 2, 8)
    spaced[..., :5] = FRAMES
    assert torch.equal(streamed(stream, spaced[..., :5]), expected)
