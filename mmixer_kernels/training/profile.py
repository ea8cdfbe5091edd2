"""The time that the parts of a training take, as a table."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .model import Recognizer

WARM_UP = 3
"""Steps before the first timed one: memory is allocated, and libraries choose their algorithms."""
STEP = ("data", "to the device", "extractors", "recurrence", "classifier and loss", "backward")
"""The parts of a step, in its order; the optimizer and the rest follow."""
BETWEEN = ("validation", "checkpoint")
"""The parts of a training that are no step's."""


class Profile:
    """A clock of the parts of training steps and of what happens between them.

    The time of a part is without that of the parts inside it. On a GPU the clock waits at both ends
    of a part until the kernels have ended, so that timed steps take longer than others.

    Args:
        steps: number of steps to time; 0 times nothing and waits for nothing.
        compiled: the network is one compiled graph, whose parts cannot be told: all of its forward
            counts as recurrence.
    """

    def __init__(self, steps: int, model: Recognizer, compiled: bool) -> None:
        self.steps, self.device = steps, next(model.parameters()).device
        self.begun = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.running: list[str] = []
        self.last = 0.0
        if steps and not compiled:
            for extractor in model.extractors:
                self._watch(extractor, "extractors")
            self._watch(model.mixer.classifier, "classifier and loss")

    @property
    def timed(self) -> int:
        """The number of steps that have been timed."""
        return self.counts["step"]

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context of a step, which is timed where it is one of the first after WARM_UP."""
        self.begun += 1
        if not WARM_UP < self.begun <= WARM_UP + self.steps:
            yield
            return
        with self._part("step"):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context of a part of a timed step, or of one between steps, which is always timed."""
        if self.running or (self.steps and name in BETWEEN):
            with self._part(name):
                yield
        else:
            yield

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _watch(self, module: nn.Module, name: str) -> None:
        """Times a module's forward as a part of a step; in a validation it is the validation's."""
        module.register_forward_pre_hook(lambda *_: self._enter(name) if self._in_step() else None)
        module.register_forward_hook(lambda *_: self._leave() if self._in_step() else None)

    def _in_step(self) -> bool:
        return self.running[:1] == ["step"]

    def _enter(self, name: str) -> None:
        self._count()
        self.running.append(name)
        self.counts[name] += 1

    def _leave(self) -> None:
        self._count()
        self.running.pop()

    def _count(self) -> None:
        """Adds the time since the last count to the part that runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.last
        self.last = now

    def __str__(self) -> str:
        """The table: each part's milliseconds per step and share of a step, then the milliseconds
        of a validation and of a checkpoint."""
        if not self.timed:
            return f"no step was timed: the training ended within the {WARM_UP} before the first"
        seconds = {part: self.seconds[part] for part in (*STEP, "optimizer")}
        seconds["rest"] = self.seconds["step"]
        total = sum(seconds.values())
        lines = [f"{'part of a step':<20}{'ms':>10}{'share':>9}"]
        lines += [
            f"{part:<20}{1e3 * value / self.timed:>10.2f}{value / total:>9.1%}"
            for part, value in seconds.items()
        ]
        lines.append(f"{'all':<20}{1e3 * total / self.timed:>10.2f}{'':>9} ({self.timed} steps)")
        for part in BETWEEN:
            if self.counts[part]:
                mean = 1e3 * self.seconds[part] / self.counts[part]
                lines.append(f"{part:<20}{mean:>10.2f}{'':>9} ({self.counts[part]} times)")
        return "\n".join(lines)
