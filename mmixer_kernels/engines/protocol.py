"""The protocol of an engine: a module with these names, and an entry of `engines.ENGINES`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Keep, Need, Problem


class EngineState(NamedTuple):
    """Available or not; the reason in words; the error that the reason came from."""

    available: bool
    reason: str
    error: BaseException | None = None


class Engine(Protocol):
    """An implementation of the recurrence.

    An engine that has a shorter way for a single step without gradients also has
    `step(step: Step) -> Tensor`, which returns the next state `[B, H]`.
    """

    NAME: str
    CHECKS: bool
    """Whether `forward`, `backward` and `step` compare shapes, dtypes and options themselves, and
    raise ValueError or TypeError before anything is computed. Others get checked calls alone."""
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
