"""Signals that ask a command to stop between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """A context in which the first SIGINT or SIGTERM lets the step in hand finish, and the second
    one acts at once.

    Args:
        gather: gives every process's value by rank, as `training.distributed.gather`; the default
            is that of a process alone.
    """

    def __init__(self, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> None:
        self.gather = gather
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # Python handles signals in the main thread only, and lets no other thread ask for it.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted, in every process, when a signal has come to one.

        Every process has to call it at the same step.
        """
        numbers = [number for number in self.gather(self.number) if number is not None]
        if numbers:
            raise Interrupted(numbers[0])

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
