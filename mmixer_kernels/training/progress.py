"""Progress on stderr: a bar on a terminal, otherwise a line per epoch."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """A context that shows a training of `epochs` epochs of `steps` steps.

    Args:
        done: steps that an earlier part of the training has taken.
        shown: False for the processes that leave it to another one.
    """

    def __init__(self, epochs: int, steps: int, done: int, shown: bool = True) -> None:
        self.epochs, self.steps, self.total = epochs, steps, epochs * steps
        self.done = self.first = done
        self.shown = shown
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=self.total,
            initial=done,
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}% |{bar}| ETA {remaining}{postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def step(self, epoch: int, loss: float, accuracy: float, data_wait: float) -> None:
        """Counts a step; the numbers are the running means of the 0-based epoch."""
        self.done += 1
        self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, data wait {data_wait:.0%}", refresh=False
        )
        self.bar.update()

    def epoch(self, record: dict[str, Any]) -> None:
        """Prints a line for an epoch's record in metrics.jsonl."""
        if not self.shown:
            return
        width = len(str(self.epochs))
        seconds = (time.perf_counter() - self.start) / max(1, self.done - self.first)
        eta = tqdm.format_interval(seconds * (self.total - self.done))
        validation = ""
        if "validation_accuracy" in record:
            validation = (
                f"  validation {record['validation_accuracy']:.1%}"
                f" (mean class {record['validation_mean_class_accuracy']:.1%})"
            )
        self.bar.write(
            f"epoch {record['epoch']:{width}}/{self.epochs}"
            f"  loss {record['loss']:.4f}  accuracy {record['accuracy']:.1%}{validation}"
            f"  {record['seconds']:.1f} s, data wait {record['data_wait']:.0%}  ETA {eta}",
            file=sys.stderr,
        )
