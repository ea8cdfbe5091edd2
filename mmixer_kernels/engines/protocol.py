"""The protocol of an engine: a module with these names, and an entry of `engines.ENGINES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Call, Cotangents, Gradients, Keep, Need, Problem


class EngineState(NamedTuple):
    """Whether an engine can run here, and why or why not."""

    available: bool
    """Whether it can."""
    reason: str
    """What it is, or what is missing."""
    error: BaseException | None = None
    """The error that the reason came from, where there was one."""


class Engine(Protocol):
    """An implementation of the recurrence, for problems that are checked.

    An engine that has a shorter way for a single step without gradients also has
    `step(step: Step) -> Tensor`, which returns the next state `[B, H]`. One that can prepare the
    steps of a stream has `stream(steps: Sequence[Step]) -> Stream`. One whose forward begins with
    a rearrangement of the weights has `prepack(call, tensors)`, which makes it of one weight set's
    and returns a `NativeEngine.run_forward` for any call with these weights, while they are what
    they were; both raise as that does. One that has several ways through a call tells in words, by
    `path(problem: Problem, backward: bool) -> str`, which one a pass takes, and why not another.
    """

    NAME: str
    DEVICES: tuple[str, ...]
    """The types of device whose tensors the engine takes; empty for any."""

    def state(self, device: torch.device | None = None) -> EngineState:
        """Whether the engine can run here, on `device` where that is one of its own, or why not."""

    def saved_size(self, problem: Problem, keep: Keep) -> int:
        """Number of elements, of the compute dtype, that `forward` leaves for `backward`. Under
        torch.compile the sizes of the problem are symbols."""

    def forward(self, problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output `[G, T, B, H]` and h_n `[G, B, H]` in the inputs' dtype, in memory of their own,
        and what is left for `backward`: `saved_size` elements; None may stand for none."""

    def backward(
        self, problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
    ) -> Gradients:
        """The gradients, each in memory of its own; `saved` and `keep` are those of `forward`."""


class Stream(Protocol):
    """Layers of cells, of which each step from the second on has the hx of the one before as its
    input. The tensors of the steps are looked at once, ValueError or TypeError tells of those that
    do not fit as they are, and what depends on the contexts alone is computed once: the weights
    must then not change."""

    def step(self, input: Tensor) -> None:
        """Writes each layer's next state over its hx.

        Raises:
            ValueError: the first layer's input is not such a one; nothing is written.
            TypeError: likewise.
        """


class NativeEngine(Engine, Protocol):
    """An engine whose pass is one call on the tensors as the caller has them.

    `run_forward` and `run_backward` raise ValueError or TypeError, before anything is computed, for
    tensors and options that the engine does not take as they are: they need no checks before.
    """

    def run_forward(
        self, call: Call, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output and h_n as the call wants them, in memory of their own, and what is left for
        `run_backward`. h_n is None for a step, and so is what is left where nothing is."""

    def run_backward(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        saved: Tensor,
        cotangents: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """The gradients of the tensors, in their order. One of the weights brings all of them, and
        so does one of the inputs or contexts; one that is not needed may be None.

        Args:
            call: that of `run_forward`.
            tensors: likewise.
            saved: what `run_forward` left.
            cotangents: those of output and h_n, None for zeros.
            needs: for each tensor whether its gradient is needed; one more stands for that of the
                first state where the call has no hx.
        """
