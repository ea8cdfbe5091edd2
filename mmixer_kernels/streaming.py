"""Step by step, as frames arrive, at the least cost a step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .arguments import check_like_weight, check_tensor
from .modules import FusedMCUCell


class CellStream:
    """Feeds a `FusedMCUCell` one step after another, without gradients.

    On a GPU the step is captured once in a CUDA graph, so that a call costs a copy of the input and
    the start of the graph; the graph reads the cell's parameters where they lie, so that they may
    change in place but not move. On a CPU a call is the cell's.

    Args:
        cell: in the dtype and on the device of what comes.
        context: `[B, context_size]`, the other modalities' action content.
        hx: the first state `[B, H]`, zeros when None.

    Raises:
        ValueError, TypeError: as `FusedMCUCell`, and ValueError for what requires a gradient.
        RuntimeError: a tracer or a transform of torch.func looks on, which could not follow.

    >>> cell = FusedMCUCell(64, 64, 128)
    >>> stream = CellStream(cell, context=torch.randn(1, 64))
    >>> for frame in torch.randn(10, 1, 64):
    ...     state = stream(frame)
    >>> state.shape
    torch.Size([1, 128])
    """

    def __init__(self, cell: FusedMCUCell, context: Tensor, hx: Tensor | None = None) -> None:
        _check_untransformed()
        if not isinstance(cell, FusedMCUCell):
            raise TypeError(f"cell must be a FusedMCUCell, but is a {type(cell).__name__}")
        check_tensor("context", context)
        _check_constant("context", context)
        if context.ndim != 2:
            raise ValueError(
                f"context must be [B, context_size], but has shape {list(context.shape)}"
            )
        if context.shape[1] != cell.context_size:
            raise ValueError(
                f"context must have {cell.context_size} features (context_size), but has shape "
                f"{list(context.shape)}"
            )
        check_like_weight("context", context, cell.weight_r)
        self.cell = cell
        self._context = context.detach().clone()
        self._input = context.new_zeros(context.shape[0], cell.input_size)
        self._state = context.new_zeros(context.shape[0], cell.hidden_size)
        self._graph: torch.cuda.CUDAGraph | None = None
        if context.is_cuda and len(context):  # a graph of nothing cannot be captured
            self._capture()
        else:
            self._step()  # so that a wrong argument shows here on either device
        self.reset(hx=hx)

    @property
    def state(self) -> Tensor:
        """The last state `[B, H]`, a copy of its own."""
        return self._state.clone()

    def reset(self, context: Tensor | None = None, hx: Tensor | None = None) -> None:
        """Begins another sequence of the same batch size.

        Args:
            context: as the constructor's; the same as before when None.
            hx: the first state, zeros when None.
        """
        if context is not None:
            _check_like("context", context, self._context)
        if hx is not None:
            _check_like("hx", hx, self._state)
        if context is not None:
            self._context.copy_(context.detach())
        if hx is None:
            self._state.zero_()
        else:
            self._state.copy_(hx.detach())

    def __call__(self, input: Tensor) -> Tensor:
        """The next state `[B, H]` after `input [B, input_size]`; the next call overwrites it."""
        _check_untransformed()
        _check_like("input", input, self._input)
        self._input.copy_(input.detach())
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        return self._state

    @torch.no_grad()
    def _step(self) -> None:
        self._state.copy_(self.cell(self._input, self._context, self._state))

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


def _check_untransformed() -> None:
    if dispatch.is_transformed():
        raise RuntimeError(
            "A CellStream cannot be traced or transformed, as its state lies in memory of its own: "
            "call the cell instead"
        )


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
            f"{source.dtype}"
        )
    if source.device != target.device:
        raise ValueError(f"{name} must be on {target.device}, but is on {source.device}")
