"""The training loop: every step a function of (options, data, position), so that it can stop
after any step and go on bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..atomic import replacing
from ..data import Batch, Data, Split
from ..errors import UserError
from ..stop import Interrupted, Stop
from . import (
    batches,
    checkpoint,
    distributed,
    metrics,
    mixed_precision,
    optimizer,
    weighted_loss,
)
from .model import Recognizer
from .options import LoaderOptions, Options
from .profile import Profile
from .progress import Progress
from .result import Evaluation, hardware
from .tensorboard import Events


@dataclass
class Totals:
    """The sums of an epoch so far."""

    loss: float = 0.0
    rights: int = 0
    """Correct predictions; checkpoints name them so."""
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def means(self) -> dict[str, float]:
        """The epoch's means so far, as metrics.jsonl has them."""
        return {
            "loss": self.loss / max(1, self.samples),
            "accuracy": self.rights / max(1, self.samples),
            "data_wait": self.data_seconds / self.seconds if self.seconds else 0.0,
        }


class Trainer:
    """A training and its position: `epoch` epochs are complete, and `step` steps of the next.

    A step is an update of the weights. Its samples, `batch_size * accumulate * processes` of them
    but for an epoch's last step, do not depend on how they are divided among processes and among
    batches that are added up.

    Args:
        model: on the device where it is to train, with the same weights in every process.
    """

    def __init__(self, options: Options, data: Data, model: Recognizer) -> None:
        self.options, self.data, self.model = options.run, data, model
        self.config = options.config()
        self.device = next(model.parameters()).device
        self.optimizer = optimizer.build(model, self.options.optimizer)
        self.scaler = mixed_precision.scaler(self.device, self.options.precision)
        self.replica = distributed.replica(model)
        self.class_weights: Tensor | None = None
        if self.options.loss.class_weights == "balanced":
            # `labels` of a set that draws its samples anew are those of one epoch.
            labels = data.train.plain().labels
            weights = weighted_loss.class_weights(labels, len(data.classes))
            self.class_weights = weights.to(self.device)
        self.profile = Profile(self.options.profile, model, self.options.compile)
        self.batch_size = self.options.loader.batch_size * distributed.world()
        self.effective_batch_size = self.batch_size * self.options.optimizer.accumulate
        self.steps = math.ceil(len(data.train) / self.effective_batch_size)
        self.epoch = self.step = 0
        self.totals = Totals()
        self.history: list[dict[str, Any]] = []

    def fit(self, output: Path, stop: Stop) -> None:
        """Trains from the position to the last epoch.

        Writes metrics.jsonl, best.pt and last.pt in `output` after every epoch, and last.pt after
        every `checkpoint_steps` steps; the last.pt before is previous.pt. The best epoch is, of
        those that were validated, the one of the highest validation accuracy; of equals, the lowest
        validation loss; of equals, the first.

        Raises:
            Interrupted: after a signal; last.pt holds the position.
            UserError: the loss is not finite; last.pt is as it was.
        """
        run, first = self.options, distributed.is_first()
        if first:
            self._write_metrics(output)
        done = self.epoch * self.steps + self.step
        try:
            with (
                Progress(run.epochs, self.steps, done, shown=first) as progress,
                Events(output if first else None, self.epoch) as events,
            ):
                while self.epoch < run.epochs:
                    stop.check()
                    self._train_epoch(output, progress, stop)
                    self._end_epoch(output, progress, events, stop)
        except Interrupted:
            self._save(output)
            raise
        if first and run.profile:
            print(self.profile, file=sys.stderr)
        distributed.barrier()  # the others read what the first process wrote

    def best(self) -> dict[str, Any]:
        """The record of the best epoch so far; `fit` says which that is."""
        return max(
            (record for record in self.history if "validation_accuracy" in record),
            key=lambda record: (record["validation_accuracy"], -record["validation_loss"]),
        )

    def _train_epoch(self, output: Path, progress: Progress, stop: Stop) -> None:
        run, totals = self.options, self.totals
        self.data.train.set_epoch(self.epoch)
        split, order = self._samples()
        order = order[self.step * run.optimizer.accumulate :]
        rank, world = distributed.rank(), distributed.world()
        shares = [batches.share(batch, rank, world) for batch in order]
        own = [part for part in shares if part]
        loaded = batches.load(split, own, run.loader.workers)
        self.model.train()
        for start in range(0, len(order), run.optimizer.accumulate):
            before = time.perf_counter()
            group = slice(start, start + run.optimizer.accumulate)
            samples = sum(map(len, order[group]))
            with self.profile.step():
                loss, correct = self._train_step(shares[group], loaded, samples)
            self.step += 1
            totals.loss += loss
            totals.rights += correct
            totals.samples += samples
            totals.seconds += time.perf_counter() - before
            progress.step(self.epoch, **totals.means())
            stop.check()
            done = self.epoch * self.steps + self.step
            if run.checkpoint_steps and done % run.checkpoint_steps == 0:
                self._save(output)

    def _samples(self) -> tuple[Split, list[list[int]]]:
        """The epoch's samples, and the indices of its batches."""
        run, train = self.options, self.data.train
        place = self.batch_size, run.seed, self.epoch
        if run.loader.sampling == "balanced":
            return batches.Repeats(train, self.epoch), batches.balanced(train.labels, *place)
        return train, batches.shuffled(len(train), *place)

    def _train_step(
        self, shares: list[list[int]], loaded: Iterator[Batch], samples: int
    ) -> tuple[float, int]:
        """Takes a step of `samples` samples; gives its summed loss and its correct predictions.

        Args:
            shares: this process's share of each batch that is added up.
            loaded: the next batches, one for each share that is not empty.
        """
        run = self.options.optimizer
        step = self.epoch * self.steps + self.step
        optimizer.set_rates(self.optimizer, run, step, self.steps, self.options.epochs)
        self.optimizer.zero_grad()
        total, correct = 0.0, 0
        for number, share in enumerate(shares, start=1):
            before = time.perf_counter()
            with self.profile.part("data"):
                batch = next(loaded) if share else None
            self.totals.data_seconds += time.perf_counter() - before
            with distributed.synchronized(self.replica, last=number == len(shares)):
                loss, right = self._loss(batch)
                # Gradients are averaged over the processes: the loss over all the step's samples
                # is the mean of the processes' sums over samples / world. So each sample counts
                # once, however uneven the shares are.
                scaled = self.scaler.scale(loss / (samples / distributed.world()))
                with self.profile.part("backward"):
                    scaled.backward()
            total += loss.item()
            correct += right
        sums = distributed.gather((total, correct))
        total, correct = sum(part[0] for part in sums), sum(part[1] for part in sums)
        if not math.isfinite(total):
            raise distributed.reported_once(self._not_finite("the training loss", total))
        with self.profile.part("optimizer"):
            self.scaler.unscale_(self.optimizer)
            if run.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), run.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return total, correct

    def _loss(self, batch: Batch | None) -> tuple[Tensor, int]:
        """The sum of the samples' losses and the number of correct predictions."""
        with mixed_precision.autocast(self.device, self.options.precision):
            if batch is None:
                return self.replica(None, None), 0
            with self.profile.part("to the device"):
                inputs, labels, lengths = batches.to_device(batch, self.device)
            with self.profile.part("recurrence"):
                logits = self.replica(inputs, lengths)
            smoothing = self.options.optimizer.label_smoothing
            with self.profile.part("classifier and loss"):
                loss = weighted_loss.summed(logits, labels, smoothing, self.class_weights)
        return loss, int((logits.argmax(1) == labels).sum())

    def _end_epoch(self, output: Path, progress: Progress, events: Events, stop: Stop) -> None:
        before = time.perf_counter()
        run, totals = self.options, self.totals
        distributed.broadcast(list(self.model.buffers()))  # running statistics differ
        validation = self._validation(stop)
        last_step = (self.epoch + 1) * self.steps - 1
        record = {
            "epoch": self.epoch + 1,
            **totals.means(),
            **validation,
            "learning_rate": optimizer.learning_rate(
                run.optimizer, last_step, self.steps, run.epochs
            ),
            "seconds": totals.seconds + time.perf_counter() - before,
            "samples_per_second": totals.samples / totals.seconds,
        }
        self.history.append(record)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, Totals()
        if distributed.is_first() and validation and self.best() is record:
            state = {"model": self.model.state_dict(), "epoch": self.epoch}
            checkpoint.save({**self._identity(), **state}, output / "best.pt")
        self._save(output)
        if distributed.is_first():
            with open(output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        events.epoch(record)
        progress.epoch(record)

    def _validation(self, stop: Stop) -> dict[str, float]:
        """The numbers of the epoch's validation, where one is due, as metrics.jsonl has them."""
        run, epoch = self.options, self.epoch + 1
        if epoch % run.validate_every and epoch < run.epochs:
            return {}
        with self.profile.part("validation"):
            validation = evaluate(
                self.model,
                self.data.validation,
                len(self.data.classes),
                run.loader,
                run.precision,
                check=stop.check,
            )
        if not math.isfinite(validation.loss):
            error = self._not_finite("the validation loss", validation.loss)
            raise distributed.reported_once(error)
        return {f"validation_{name}": value for name, value in validation.summary().items()}

    def _save(self, output: Path) -> None:
        """Writes the position, which every process takes part in."""
        with self.profile.part("checkpoint"):
            state = self.state()
            if distributed.is_first():
                checkpoint.save_last(state, output)

    def _not_finite(self, name: str, value: float) -> UserError:
        return UserError(
            f"{name} is {value} in epoch {self.epoch + 1} at step {self.step + 1} of {self.steps}: "
            "lower --optimizer.learning-rate, limit the gradient with --optimizer.clip-norm 1, or "
            "look for values that are not finite in the data; best.pt and last.pt, where there are "
            "any, are of the epochs before"
        )

    def _write_metrics(self, output: Path) -> None:
        """Writes the position's metrics.jsonl: a killed training may have left more or less."""
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        with replacing(output / "metrics.jsonl") as file:
            file.write(lines.encode())

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config, "data": identity(self.data)}

    def state(self) -> dict[str, Any]:
        """The whole state of a training, in tensors and plain types; random states by rank.

        Every process has to call it at the same step.
        """
        cuda = self.device.type == "cuda"
        return {
            **self._identity(),
            "processes": distributed.world(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": distributed.gather(torch.get_rng_state()),
            "random_cuda": distributed.gather(
                torch.cuda.get_rng_state(self.device) if cuda else None
            ),
            "threads": torch.get_num_threads(),
            "hardware": distributed.gather(hardware(self.device)),
            "epoch": self.epoch,
            "step": self.step,
            "totals": asdict(self.totals),
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the position of a `state` with the same options, data and number of processes, and
        its random state."""
        self.model.load_state_dict(state["model"])
        optimizer.load_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        rank = distributed.rank()
        torch.set_rng_state(state["random"][rank])
        if state["random_cuda"][rank] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"][rank], self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals = Totals(**state["totals"])
        self.history = state["history"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    classes: int,
    loader: LoaderOptions,
    precision: str = "float32",
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The confusion matrix and mean loss of a model over a split, every sample once.

    Processes take the batches in turn, without padding. The batches are those of one process, and
    the sum of their losses is rounded once, so the result is the same to the last bit.

    Args:
        precision: that of `RunOptions`.
        check: called after every round of batches, in every process; may raise to stop.
    """
    device = next(model.parameters()).device
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    losses: list[float] = []
    model.eval()
    order = batches.in_order(len(split), loader.batch_size)
    rank, world = distributed.rank(), distributed.world()
    loaded = batches.load(split, order[rank::world], loader.workers)
    for _ in range(0, len(order), world):
        for batch in itertools.islice(loaded, 1):
            inputs, labels, lengths = batches.to_device(batch, device)
            with mixed_precision.autocast(device, precision):
                logits = model(inputs, lengths)
                losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
            confusion += metrics.confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), classes)
        check()
    parts = distributed.gather((confusion, losses))
    loss = math.fsum(value for _, values in parts for value in values)
    return Evaluation(torch.stack([part for part, _ in parts]).sum(0), loss / len(split))


def identity(data: Data) -> dict[str, Any]:
    """The properties of a data set that a checkpoint remembers, in plain types."""
    return {
        "modalities": list(data.modalities),
        "classes": list(data.classes),
        "feature_sizes": None if data.feature_sizes is None else list(data.feature_sizes),
        "samples": [len(data.train), len(data.validation), len(data.test)],
        "moments": data.moments,
        "steps": data.steps,
        "forms": data.forms,
    }
