"""Step by step, as frames arrive, at the least cost a step."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from . import arguments, dispatch
from .arguments import check_like_weight, check_tensor
from .engines import Stream, chosen
from .modules import FusedMCUCell
from .problem import Step
from .quantized import QuantizedMCUCell
from .stack import FusedMCUStack
from .unit import SeenParameters

_Cell = FusedMCUCell | FusedMCUStack | QuantizedMCUCell


class CellStream:
    """Feeds a `FusedMCUCell`, its `quantized()`, or all layers of a `FusedMCUStack`, one step after
    another, without gradients.

    On a GPU the step is captured once in a CUDA graph, so that a call costs a copy of the input and
    the start of the graph; the graph reads the cell's parameters where they lie, so that they may
    change in place but not move. On a CPU a call is one of the engine, which keeps between steps
    what depends on the context alone, two of seven products, to the bits of the cell's results:
    parameters may change and move. But PyTorch does not count the changes that are made by `.data`,
    by optimizers with `fused=True`, or by another owner of the memory, such as NumPy: in the middle
    of a sequence, call `reset(hx=stream.state)` after these, and after a change of MMIXER_ENGINE. A
    call is the cell's where hooks, modes, autocast or a profiler look on, and with other engines.

    Args:
        cell: in the dtype and on the device of what comes; beside bfloat16 parameters, what comes
            may be float32, and context and hx then are too. A stack must have one direction, and be
            in eval mode where it has a dropout between layers.
        context: `[B, context_size]`, the other modalities' action content; None for a cell without
            context.
        hx: the first state `[B, H]`, of a stack `[L, B, H]`, zeros when None. Without context and
            hx, what comes has the parameters' dtype.
        batch_size: B where neither context nor hx says it; 1 when None.

    Raises:
        ValueError: as the cell, and for what requires a gradient.
        TypeError: as the cell.
        RuntimeError: a tracer or a transform of torch.func looks on, which could not follow.

    Examples:
        >>> cell = FusedMCUCell(64, 64, 128)
        >>> stream = CellStream(cell, context=torch.randn(1, 64))
        >>> for frame in torch.randn(10, 1, 64):
        ...     state = stream(frame)
        >>> state.shape
        torch.Size([1, 128])

        >>> stream = CellStream(FusedMCUStack(64, 0, 128, num_layers=2))
        >>> stream(torch.randn(1, 64)).shape, stream.state.shape
        (torch.Size([1, 128]), torch.Size([2, 1, 128]))
    """

    def __init__(
        self,
        cell: _Cell,
        context: Tensor | None = None,
        hx: Tensor | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        _check_untransformed()
        _check_cell(cell)
        _check_context(cell, context)
        weight = _like_operands(cell)
        for name, operand in {"context": context, "hx": hx}.items():
            if operand is not None:
                check_tensor(name, operand)
                _check_constant(name, operand)
                check_like_weight(name, operand, weight)
        like = next((x for x in (context, hx) if x is not None), weight)
        batch = _batch_size(batch_size, context, hx)
        self.cell = cell
        self._context = like.new_empty(0) if context is None else context.detach().clone()
        self._input = like.new_zeros(batch, cell.input_size)
        is_stack = isinstance(cell, FusedMCUStack)
        layers = (cell.num_layers,) if is_stack else ()
        self._state = like.new_zeros(*layers, batch, cell.hidden_size)
        self._output = self._last_state()
        own = self._context if cell.context_size else None
        self._direct = _DirectSteps(self._input, own, self._state)
        self._graph: torch.cuda.CUDAGraph | None = None
        if hx is not None:
            _check_like("hx", hx, self._state)
        if self._input.is_cuda and batch:  # a graph of nothing cannot be captured
            self._capture()
        else:
            self._step()  # so that a wrong argument shows here on either device
        self.reset(hx=hx)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._output = self._last_state()  # Pickled tensors share no memory.

    def _last_state(self) -> Tensor:
        """The last layer's, where it lies."""
        return self._state[-1] if isinstance(self.cell, FusedMCUStack) else self._state

    @property
    def state(self) -> Tensor:
        """The last state `[B, H]`, of a stack `[L, B, H]`, a copy of its own."""
        return self._state.clone()

    def reset(self, context: Tensor | None = None, hx: Tensor | None = None) -> None:
        """Begins another sequence of the same batch size.

        Args:
            context: as the constructor's; the same as before when None.
            hx: the first state, zeros when None.
        """
        if context is not None:
            _check_context(self.cell, context)
            _check_like("context", context, self._context)
        if hx is not None:
            _check_like("hx", hx, self._state)
        if context is not None:
            self._context.copy_(context.detach())
        if hx is None:
            self._state.zero_()
        else:
            self._state.copy_(hx.detach())
        self._direct.forget()

    def __call__(self, input: Tensor) -> Tensor:
        """The next state `[B, H]` after `input [B, input_size]`, of a stack the last layer's; the
        next call overwrites it."""
        if self._graph is None and self._direct.take(self.cell, input):
            return self._output
        _check_untransformed()
        _check_mode(self.cell)
        _check_like("input", input, self._input)
        self._input.copy_(input.detach())
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        return self._output

    @torch.no_grad()
    def _step(self) -> None:
        context = self._context if self.cell.context_size else None
        if isinstance(self.cell, FusedMCUStack):
            sequence = self._input.unsqueeze(1 if self.cell.batch_first else 0)
            _, state = self.cell(sequence, context, self._state)
        else:
            state = self.cell(self._input, context, self._state)
        self._state.copy_(state)

    def _capture(self) -> None:
        """Warmed up on another stream, as captures want it."""
        device = self._input.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()


_OPTIONS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    FusedMCUCell: attrgetter("mix", "eps", "engine"),
    FusedMCUStack: attrgetter("mix", "eps", "engine", "training", "dropout"),
    QuantizedMCUCell: attrgetter("mix", "eps", "engine"),
}


class _DirectSteps:
    """A stream's way to an engine that keeps between steps what it has read of the parameters; it
    reads them again when they have changed, and knows so by their addresses and versions.

    Args:
        input: such as steps have. context: None without.
        state: of the cell or of all layers; a step overwrites it.
    """

    def __init__(self, input: Tensor, context: Tensor | None, state: Tensor) -> None:
        self._input, self._context, self._state = input, context, state
        self._parameters: SeenParameters | None = None
        self._seen: tuple[Any, ...] | None = None
        self._stream: Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads the parameters that were copied with it."""
        return {**self.__dict__, "_parameters": None, "_stream": None}

    def forget(self) -> None:
        """Lets the next step read the parameters and the context again."""
        self._parameters = None

    def take(self, cell: _Cell, input: Tensor) -> bool:
        """Takes a step; False, and nothing is done, where the cell has to be called."""
        if has_torch_function((input,)):
            return False
        kind = dispatch.plain((input,))
        if kind is None or kind.needs_gradient or not input.is_cpu:
            return False
        if type(cell) not in _OPTIONS or not dispatch.is_forward_alone(cell):
            return False
        parameters, seen = self._parameters, self._look_at(cell)
        if parameters is None or seen != self._seen or not parameters.are(_fields(cell)):
            parameters = SeenParameters(_fields(cell))
            self._stream = self._open(cell) if parameters.are_counted else None
            # Only then, lest the stream before pass for theirs where opening was interrupted.
            self._parameters, self._seen = parameters, seen
        if self._stream is None:
            return False
        try:
            self._stream.step(input)
        except (TypeError, ValueError):
            return False
        increment_version(self._state)  # PyTorch does not know who writes to it.
        return True

    def _look_at(self, cell: _Cell) -> tuple[Any, ...]:
        """All but the parameters that an open stream depends on, as far as it can change."""
        return torch.get_num_threads(), self._state.data_ptr(), *_OPTIONS[type(cell)](cell)

    def _open(self, cell: _Cell) -> Stream | None:
        """None where the engine has no streams, or does not take the operands as they are."""
        if tuple(_fields(cell)) != cell._names:
            return None
        sets: list[Any]
        if isinstance(cell, FusedMCUStack):
            sets, states = cell.weights(), list(self._state)
        else:
            sets, states = [cell.weights()], [self._state]
        inputs = [self._input, *states]
        steps = [
            Step(x, self._context, weights, hx, cell.mix, cell.eps)
            for x, weights, hx in zip(inputs, sets, states, strict=False)
        ]
        kind = dispatch.plain([x for step in steps for x in step.tensors()])
        if kind is None or not kind.is_on_one_device:
            return None
        try:
            _check_mode(cell)
            open_stream = getattr(chosen(cell.engine, self._input), "stream", None)
            return None if open_stream is None else open_stream(steps)
        except (TypeError, ValueError):
            return None


def _fields(cell: _Cell) -> dict[str, Any]:
    """The tensors that the cell computes with, by name."""
    return cell._buffers if type(cell) is QuantizedMCUCell else cell._parameters


def _like_operands(cell: _Cell) -> Tensor:
    """One of the cell's tensors, in the dtype of what comes."""
    if isinstance(cell, QuantizedMCUCell):
        return cell.scale
    return cell.weights()[0].weight_r if isinstance(cell, FusedMCUStack) else cell.weight_r


def _check_untransformed() -> None:
    if dispatch.is_transformed():
        raise RuntimeError(
            "A CellStream cannot be traced or transformed, as its state lies in memory of its own: "
            "call the cell instead"
        )


def _check_cell(cell: object) -> None:
    """Raises unless a step of it depends on no later one, and on no chance."""
    if not isinstance(cell, _Cell):
        raise TypeError(
            "cell must be a FusedMCUCell, its quantized(), or a FusedMCUStack, but is a "
            f"{type(cell).__name__}"
        )
    if cell.bidirectional:
        raise ValueError(
            "cell must have one direction, but is bidirectional, and its second direction begins "
            "with the last step: gather the steps and call the stack"
        )
    _check_mode(cell)


def _check_mode(cell: _Cell) -> None:
    if isinstance(cell, FusedMCUStack) and cell.training and cell.dropout and cell.num_layers > 1:
        raise ValueError(
            f"cell must be in eval mode, since a CellStream drops nothing between layers, but is "
            f"in training mode with dropout={cell.dropout!r}: call .eval() first"
        )


def _check_context(cell: _Cell, context: Tensor | None) -> None:
    size = cell.context_size
    if size == 0:
        if context is None:
            return
        raise ValueError(
            "context must be None, since this cell has none (context_size=0): leave it out, and "
            "give a first state as hx"
        )
    context = check_tensor("context", context)
    if context.ndim != 2:
        raise ValueError(f"context must be [B, context_size], but has shape {list(context.shape)}")
    if context.shape[1] != size:
        raise ValueError(
            f"context must have {size} features (context_size), but has shape {list(context.shape)}"
        )


def _batch_size(given: int | None, context: Tensor | None, hx: Tensor | None) -> int:
    """That of context or hx, which the given one must equal; else the given one, or 1."""
    if given is not None:
        arguments.check_sizes({"batch_size": given})
    for name, operand in {"context": context, "hx": hx}.items():
        if operand is not None and operand.ndim > 1:
            batch = operand.shape[-2]
            if given not in (None, batch):
                raise ValueError(
                    f"batch_size must be {name}'s, {batch}, but is {given}: leave it out"
                )
            return batch
    return 1 if given is None else given


def _check_constant(name: str, source: Tensor) -> None:
    if source.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, since a CellStream computes none, but does: "
            "stream inside torch.no_grad(), or call the cell instead"
        )


def _check_like(name: str, source: Tensor, target: Tensor) -> None:
    check_tensor(name, source)
    _check_constant(name, source)
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(
            f"{name} must be {list(target.shape)} {target.dtype}, but is {list(source.shape)} "
            f"{source.dtype}: the stream's batch size and dtype are those of the context, or hx, "
            "that it was made with, and without either batch_size and the parameters' dtype"
        )
    if source.device != target.device:
        raise ValueError(f"{name} must be on {target.device}, but is on {source.device}")
