"""Interleaved timing: contenders take turns in one process, and what is reported is ratios.

A round gives each contender a turn, so that whatever else the machine does in that moment hits all
of them alike. Calls shorter than `SHORT` are preceded by an untimed one, so that a contender finds
its own weights in the caches and not its rival's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch

SHORT = 0.02
"""Seconds; a longer call refills the caches in a small part of its own time."""

Times = dict[str, list[float]]
"""Seconds of each contender's calls, in the order of the rounds."""


class Contender(NamedTuple):
    """A name for the tables, and the call that is timed; it ends when its work is done."""

    name: str
    call: Callable[[], object]


class Ratio(NamedTuple):
    """Our time over a baseline's: of the medians, and the quartiles of the single rounds."""

    of_medians: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.of_medians:.2f} ({self.low:.2f}-{self.high:.2f})"


def synchronised(contender: Contender, device: torch.device) -> Contender:
    """The contender waiting for the device's work; on a CPU a call has ended when it returns."""
    if device.type == "cpu":
        return contender

    def call() -> None:
        contender.call()
        torch.accelerator.synchronize(device)

    return Contender(contender.name, call)


Clock = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _estimate(contender: Contender, clock: Clock) -> float:
    """Seconds that a timed call costs; the first one also pays for allocations, which shows in a
    short call."""
    first = seconds(lambda: clock(contender.call))
    return first if first > 10 * SHORT else seconds(lambda: clock(contender.call))


def cuda_seconds(call: Callable[[], object], cycles: int = 0) -> float:
    """Seconds between CUDA events around a call on the current stream of an idle GPU.

    With cycles, the GPU first sleeps so long, and the host hurries ahead: what the call takes on
    the GPU alone, where the host has come to the end of the call before the GPU wakes.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Turns:
    """The contenders of one comparison, warmed up, and the number of rounds for a time budget.

    Args:
        contenders: ours first, then the baselines.
        budget: seconds for all rounds; at least 5 rounds are run, and at most 500.
        clock: what times a round; by default the processor's.
    """

    def __init__(
        self, contenders: Sequence[Contender], budget: float, clock: Clock = seconds
    ) -> None:
        self.ours, *self.baselines = contenders
        self._clock = clock
        first = {contender.name: _estimate(contender, clock) for contender in contenders}
        self._short = {name for name, duration in first.items() if duration < SHORT}
        duration = sum(first.values()) + sum(first[name] for name in self._short)
        self.rounds = int(min(max(budget / duration, 5), 500))
        self.times: Times = {contender.name: [] for contender in contenders}

    def warm(self, contender: Contender) -> None:
        if contender.name in self._short:
            contender.call()

    def take(self, contender: Contender) -> None:
        self.warm(contender)
        self.times[contender.name].append(self._clock(contender.call))

    def take_baselines(self) -> None:
        """The baselines' turns of a round, and ours up to the call that is to be timed."""
        for contender in self.baselines:
            self.take(contender)
        self.warm(self.ours)

    def ratios(self) -> dict[str, Ratio]:
        ours = self.times[self.ours.name]
        return {
            contender.name: ratio(ours, self.times[contender.name]) for contender in self.baselines
        }


def interleave(contenders: Sequence[Contender], budget: float, clock: Clock = seconds) -> Times:
    """All rounds of a comparison outside pytest-benchmark."""
    turns = Turns(contenders, budget, clock)
    for _ in range(turns.rounds):
        for contender in contenders:
            turns.take(contender)
    return turns.times


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Raises ValueError when the two have not been timed in the same rounds."""
    rounds = [a / b for a, b in zip(ours, baseline, strict=True)]
    low, _, high = quantiles(rounds, n=4)
    return Ratio(median(ours) / median(baseline), low, high)
