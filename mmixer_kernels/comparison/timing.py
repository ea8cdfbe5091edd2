"""Interleaved timing: contenders take turns in one process, and what is reported is ratios.

A round gives each contender a turn, so that whatever else the machine does in that moment hits all
of them alike. Calls shorter than `SHORT` are preceded by untimed ones, so that a contender finds
its own weights in the caches and not its rival's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

SHORT = 0.02
"""Seconds; a longer call refills the caches in a small part of its own time."""
WARMING = 0.02
"""Seconds of untimed calls before a short one on a processor: an L3 cache takes some four calls to
keep what they read, and threads of another runtime that wait for work spin for milliseconds."""
RESAMPLES = 2000
"""How often the rounds are drawn again for a ratio's interval."""
Times = dict[str, list[float]]
"""Seconds of each contender's calls, in the order of the rounds."""


class Contender(NamedTuple):
    """A name for the tables, and the call that is timed; it ends when its work is done."""

    name: str
    call: Callable[[], object]


class Ratio(NamedTuple):
    """Our time over a baseline's: of the medians, and its 95 % bootstrap interval."""

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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch has so many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Clock = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


def seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes, on the wall's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _estimate(contender: Contender, clock: Clock) -> float:
    """Seconds that a timed call costs; the first one also pays for allocations, which shows in a
    short call."""
    first = seconds(lambda: clock(contender.call))
    return first if first > 10 * SHORT else seconds(lambda: clock(contender.call))


class Turns:
    """The contenders of one comparison, warmed up, and the number of rounds for a time budget.

    Args:
        contenders: ours first, then the baselines.
        budget: seconds for all rounds; at least 5 rounds are run, and at most 500.
        clock: the function that times a round; by default the processor's.
        warming: seconds of untimed calls before a short one that is timed; one call at least.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        budget: float,
        clock: Clock = seconds,
        warming: float = 0.0,
    ) -> None:
        self.ours, *self.baselines = contenders
        self._clock, self._warming = clock, warming
        first = {contender.name: _estimate(contender, clock) for contender in contenders}
        self._short = {name for name, duration in first.items() if duration < SHORT}
        duration = sum(first.values()) + sum(max(first[name], warming) for name in self._short)
        self.rounds = int(min(max(budget / duration, 5), 500))
        self.times: Times = {contender.name: [] for contender in contenders}

    def warm(self, contender: Contender) -> None:
        """Calls a short contender untimed."""
        if contender.name in self._short:
            end = time.perf_counter() + self._warming
            contender.call()
            while time.perf_counter() < end:
                contender.call()

    def take(self, contender: Contender) -> None:
        """Times one call of a contender."""
        self.warm(contender)
        self.times[contender.name].append(self._clock(contender.call))

    def take_baselines(self) -> None:
        """The baselines' turns of a round, and ours up to the call that is to be timed."""
        for contender in self.baselines:
            self.take(contender)
        self.warm(self.ours)

    def ratios(self) -> dict[str, Ratio]:
        """Our time over each baseline's."""
        ours = self.times[self.ours.name]
        return {
            contender.name: ratio(ours, self.times[contender.name]) for contender in self.baselines
        }


def interleave(
    contenders: Sequence[Contender],
    budget: float,
    clock: Clock = seconds,
    warming: float = 0.0,
) -> Times:
    """All rounds of a comparison outside pytest-benchmark.

    Every second round has the contenders in the opposite order, so that what one leaves behind (a
    warm or a throttled processor) does not always meet the same next one.
    """
    turns = Turns(contenders, budget, clock, warming)
    for number in range(turns.rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            turns.take(contender)
    return turns.times


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """The ratio of the medians. Whole rounds are drawn again for its interval, so that what slows
    both contenders of a round does not widen it; equal times give equal intervals.

    Raises ValueError when the two have not been timed in the same rounds.
    """
    rounds = np.array(list(zip(ours, baseline, strict=True)))
    drawn = np.random.default_rng(0).integers(len(rounds), size=(RESAMPLES, len(rounds)))
    medians = np.median(rounds[drawn], axis=1)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])
    return Ratio(median(ours) / median(baseline), float(low), float(high))
