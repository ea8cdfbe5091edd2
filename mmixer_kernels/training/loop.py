"""The training loop: every step a function of (options, data, position), so that it can stop
after any step and go on bit for bit."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..data import Batch, Data, Split, collate
from . import checkpoint, metrics, optimizer
from .command import UserError
from .model import Recognizer
from .options import LoaderOptions, Options
from .progress import Progress
from .result import Evaluation


class Interrupted(Exception):
    """A signal asked the training to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """A context in which the first SIGINT or SIGTERM lets the step in hand finish, and the second
    one acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # Python handles signals in the main thread only, and lets no other thread ask for it.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


@dataclass
class Totals:
    """An epoch's sums so far."""

    loss: float = 0.0
    rights: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def means(self) -> dict[str, float]:
        return {
            "loss": self.loss / max(1, self.samples),
            "accuracy": self.rights / max(1, self.samples),
            "data_wait": self.data_seconds / self.seconds if self.seconds else 0.0,
        }


class Trainer:
    """A training and its position: `epoch` epochs are complete, and `step` steps of the next.

    Args:
        model: on the device where it is to train.
    """

    def __init__(self, options: Options, data: Data, model: Recognizer) -> None:
        self.options, self.data, self.model = options.run, data, model
        self.config = options.config()
        self.device = next(model.parameters()).device
        self.optimizer = optimizer.build(model, self.options.optimizer)
        self.steps = math.ceil(len(data.train) / self.options.loader.batch_size)
        self.epoch = self.step = 0
        self.totals = Totals()
        self.history: list[dict[str, Any]] = []

    def fit(self, output: Path, stop: Stop) -> None:
        """Trains from the position to the last epoch.

        Writes metrics.jsonl, best.pt and last.pt in `output` after every epoch. The best epoch is
        the one of the highest validation accuracy; of equals, the lowest validation loss; of
        equals, the first.

        Raises:
            Interrupted: after a signal; last.pt holds the position.
            UserError: the loss is not finite; last.pt is as it was.
        """
        self._write_metrics(output)
        done = self.epoch * self.steps + self.step
        try:
            with Progress(self.options.epochs, self.steps, done) as progress:
                while self.epoch < self.options.epochs:
                    stop.check()
                    self._train_epoch(progress, stop)
                    self._end_epoch(output, progress, stop)
        except Interrupted:
            checkpoint.save(self.state(), output / "last.pt")
            raise

    def best(self) -> dict[str, Any]:
        """The record of the best epoch so far; `fit` says which that is."""
        return max(
            self.history,
            key=lambda record: (record["validation_accuracy"], -record["validation_loss"]),
        )

    def _train_epoch(self, progress: Progress, stop: Stop) -> None:
        run, totals = self.options, self.totals
        self.data.train.set_epoch(self.epoch)
        order = _batches(len(self.data.train), run.loader.batch_size, run.seed, self.epoch)
        before = time.perf_counter()
        self.model.train()
        for batch in _loader(self.data.train, order[self.step :], run.loader.workers):
            loaded = time.perf_counter()
            loss, rights = self._train_step(batch)
            self.step += 1
            now = time.perf_counter()
            totals.loss += loss * len(batch.labels)
            totals.rights += rights
            totals.samples += len(batch.labels)
            totals.data_seconds += loaded - before
            totals.seconds += now - before
            before = now
            progress.step(self.epoch, **totals.means())
            stop.check()

    def _train_step(self, batch: Batch) -> tuple[float, int]:
        """The loss and the number of right predictions of a step."""
        run = self.options.optimizer
        step = self.epoch * self.steps + self.step
        rate = optimizer.learning_rate(run, step, self.steps, self.options.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, labels, lengths = _to_device(batch, self.device)
        logits = self.model(inputs, lengths)
        loss = F.cross_entropy(logits, labels, label_smoothing=run.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite("the training loss", value)
        self.optimizer.zero_grad()
        loss.backward()
        if run.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), run.clip_norm)
        self.optimizer.step()
        return value, int((logits.argmax(1) == labels).sum())

    def _end_epoch(self, output: Path, progress: Progress, stop: Stop) -> None:
        before = time.perf_counter()
        run, totals = self.options, self.totals
        classes = len(self.data.classes)
        validation = evaluate(
            self.model, self.data.validation, classes, run.loader, check=stop.check
        )
        if not math.isfinite(validation.loss):
            raise self._not_finite("the validation loss", validation.loss)
        last_step = (self.epoch + 1) * self.steps - 1
        record = {
            "epoch": self.epoch + 1,
            **totals.means(),
            **{f"validation_{name}": value for name, value in validation.summary().items()},
            "learning_rate": optimizer.learning_rate(
                run.optimizer, last_step, self.steps, run.epochs
            ),
            "seconds": totals.seconds + time.perf_counter() - before,
            "samples_per_second": totals.samples / totals.seconds,
        }
        self.history.append(record)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, Totals()
        if self.best() is record:
            state = {"model": self.model.state_dict(), "epoch": self.epoch}
            checkpoint.save({**self._identity(), **state}, output / "best.pt")
        checkpoint.save(self.state(), output / "last.pt")
        with open(output / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        progress.epoch(record)

    def _not_finite(self, name: str, value: float) -> UserError:
        return UserError(
            f"{name} is {value} in epoch {self.epoch + 1} at step {self.step + 1} of {self.steps}: "
            "lower --optimizer.learning-rate, limit the gradient with --optimizer.clip-norm 1, or "
            "look for values that are not finite in the data; best.pt and last.pt, where there are "
            "any, are of the epochs before"
        )

    def _write_metrics(self, output: Path) -> None:
        """metrics.jsonl as the position has it: a killed training may have written more or less."""
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        with checkpoint.replacing(output / "metrics.jsonl") as file:
            file.write(lines.encode())

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config, "data": identity(self.data)}

    def state(self) -> dict[str, Any]:
        """All that a training needs to go on, in tensors and plain types."""
        cuda = self.device.type == "cuda"
        return {
            **self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": asdict(self.totals),
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the position of a `state` with the same options and data, and its random state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals = Totals(**state["totals"])
        self.history = state["history"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    classes: int,
    loader: LoaderOptions,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The confusion matrix and mean loss of a model over a split, every sample once.

    Args:
        check: called after every batch; may raise to stop.
    """
    device = next(model.parameters()).device
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    loss = 0.0
    model.eval()
    for inputs, labels, lengths in batches_in_order(split, loader, device):
        logits = model(inputs, lengths)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        confusion += metrics.confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), classes)
        check()
    return Evaluation(confusion, loss / len(split))


def batches_in_order(
    split: Split, loader: LoaderOptions, device: torch.device
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """inputs, labels and lengths of every sample of a split, once and in its order."""
    indices = torch.arange(len(split)).split(loader.batch_size)
    for batch in _loader(split, [part.tolist() for part in indices], loader.workers):
        yield _to_device(batch, device)


def identity(data: Data) -> dict[str, Any]:
    """What a checkpoint remembers of its data set, in plain types."""
    return {
        "modalities": list(data.modalities),
        "classes": list(data.classes),
        "feature_sizes": None if data.feature_sizes is None else list(data.feature_sizes),
        "samples": [len(data.train), len(data.validation), len(data.test)],
    }


def _batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of an epoch's steps, in an order of their own for every (seed, epoch)."""
    entropy = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).view(np.int64)
    generator = torch.Generator().manual_seed(int(entropy[0]))
    order = torch.randperm(samples, generator=generator)
    return [part.tolist() for part in order.split(batch_size)]


def _loader(split: Split, batches: Sequence[list[int]], workers: int) -> DataLoader[Any]:
    # A loader without a generator of its own draws from the one that dropout uses.
    return DataLoader(
        split,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to_device(batch: Batch, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor | None]:
    lengths = None if batch.lengths is None else batch.lengths.to(device)
    return [x.to(device) for x in batch.inputs], batch.labels.to(device), lengths
