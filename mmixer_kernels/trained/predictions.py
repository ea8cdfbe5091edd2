"""A network's predictions for single samples, by stream and all together (Figure 5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import ArraysOptions, Batch, Split
from ..data.clips import ClipSplit
from ..data.loose import clips_of
from ..data.video import VideoOptions
from ..errors import UserError, user_errors
from ..network import StreamClassifiers
from ..training import batches, metrics, mixed_precision, result
from . import streams
from .restore import Restored


@dataclass(frozen=True)
class Prediction:
    """A sample and its classes' logits."""

    name: str
    """The sample's name, or its file or split and its place there."""
    label: int | None
    """The class, None where it is not known."""
    inputs: dict[str, Tensor]
    """`[T, ...]` by modality."""
    logits: dict[str, Tensor]
    """`[K]` by stream, on the CPU: each modality's where there are classifiers of the streams
    (Eq. 15), and last the whole network's (Eq. 5), named as `rgb+depth`."""

    @property
    def confidences(self) -> dict[str, Tensor]:
        """The classes' probabilities `[K]` by stream, float64: rounded to float32 two of them could
        be equal where the logits are not."""
        return {name: values.double().softmax(-1) for name, values in self.logits.items()}

    @property
    def predicted(self) -> dict[str, int]:
        """The most likely class by stream; of equals the first, as an evaluation takes it."""
        return {name: int(values.argmax()) for name, values in self.logits.items()}

    def top(self, count: int) -> dict[str, list[tuple[int, float]]]:
        """The `count` most likely classes of each stream with their confidences, best first."""
        best = {
            name: values.topk(min(count, len(values))) for name, values in self.confidences.items()
        }
        return {
            name: list(zip(indices.tolist(), values.tolist(), strict=True))
            for name, (values, indices) in best.items()
        }


def of_files(restored: Restored, path: Path, files: Sequence[Path]) -> Iterator[Prediction]:
    """Predictions for samples that are given file by file: those of video as `data/loose.py` has
    it, and those of arrays as `data/arrays.py` has it, with labels or without.

    Samples go through the network in batches of the run's loader, in their order.

    Args:
        restored: the network; its data set needs no samples.
        path: the checkpoint's path; classifiers of the streams are used where they are beside it.
        files: the files of the samples, any number of samples.

    Raises:
        UserError: the data set has no such files, or they do not make up samples.
    """
    options = restored.options.data
    splits: list[tuple[str, Split]]
    with user_errors():
        if isinstance(options, VideoOptions):
            clips = clips_of(files, options, restored.data)
            splits = [("", options.split_of(clips, seed=0, training=False))]
        elif isinstance(options, ArraysOptions):
            read = options.samples_of(files, restored.data, path)
            splits = [(str(split.arrays.path), split) for split in read]
        else:
            raise UserError(
                f"the samples of {restored.options.run.data} are not files: choose some by --index"
            )
    return itertools.chain.from_iterable(
        _predict(restored, path, split, range(len(split)), name) for name, split in splits
    )


def of_split(
    restored: Restored, path: Path, part: str, indices: Sequence[int] | None = None
) -> Iterator[Prediction]:
    """Predictions for samples of the data set, in batches of the run's loader; for a whole split
    these are the batches of an evaluation.

    Args:
        restored: the network and its data set.
        path: as in `of_files`.
        part: "train" (without augmentation), "validation" or "test".
        indices: the samples' places in the split; all of them when None.

    Raises:
        UserError: an index out of its range.
    """
    split: Split = getattr(restored.data, part).plain()
    for index in indices or ():
        if not 0 <= index < len(split):
            raise UserError(f"--index must be in 0..{len(split) - 1} for {part}, but is {index}")
    chosen = range(len(split)) if indices is None else indices
    return _predict(restored, path, split, chosen, part)


@torch.no_grad()
def _predict(
    restored: Restored, path: Path, split: Split, indices: Sequence[int], part: str
) -> Iterator[Prediction]:
    run, modalities = restored.options.run, restored.data.modalities
    heads = streams.load_heads(restored.model, path)
    mixed_precision.check(restored.model, split, run)
    size = run.loader.batch_size
    order = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    workers = run.loader.workers if len(order) > 1 else 0  # starting them takes longer than a batch
    for places, batch in zip(order, batches.load(split, order, workers), strict=True):
        logits = _logits(restored, heads, batch)
        for row, index in enumerate(places):
            name = split.clips[index].name if isinstance(split, ClipSplit) else f"{part} {index}"
            label = int(batch.labels[row])
            steps = None if batch.lengths is None else int(batch.lengths[row])
            yield Prediction(
                name,
                label if label >= 0 else None,
                {m: x[row, :steps] for m, x in zip(modalities, batch.inputs, strict=True)},
                {stream: values[row] for stream, values in logits.items()},
            )


def _logits(restored: Restored, heads: StreamClassifiers | None, batch: Batch) -> dict[str, Tensor]:
    """The logits `[B, K]` of each stream, on the CPU, as an evaluation has them."""
    model, modalities = restored.model, restored.data.modalities
    device = next(model.parameters()).device
    inputs, _, lengths = batches.to_device(batch, device)
    # Without torch.compile, which takes minutes: its results may differ in their last bits.
    with mixed_precision.autocast(device, restored.options.run.precision):
        states = model.streams(inputs, lengths)
        joint = model.classify(states)
    logits = {}
    if heads is not None:
        logits = dict(zip(modalities, streams.stream_logits(heads, states), strict=True))
    logits["+".join(modalities)] = joint
    return {name: values.cpu() for name, values in logits.items()}


class Tally:
    """The counts of predictions.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.samples = 0
        self.labels: list[int] = []
        self.predicted: dict[str, list[int]] = {}

    def add(self, prediction: Prediction) -> None:
        """Counts a prediction, and its classes where its sample has a label."""
        self.samples += 1
        if prediction.label is not None:
            self.labels.append(prediction.label)
            for stream, label in prediction.predicted.items():
                self.predicted.setdefault(stream, []).append(label)

    def describe(self, split: str) -> list[str]:
        """The accuracies over the samples that have labels, in the lines in which `evaluate` tells
        them; none without labels."""
        if not self.labels:
            return []
        labels = torch.tensor(self.labels)
        *alone, together = (
            (stream, metrics.confusion_matrix(labels, torch.tensor(predicted), self.classes))
            for stream, predicted in self.predicted.items()
        )
        lines = [result.headline(split, together[1])]
        lines += [result.stream_line(name, metrics.accuracy(x)) for name, x in alone]
        without = self.samples - len(self.labels)
        return [*lines, f"{without} more samples have no label"] if without else lines


def describe(predictions: Sequence[Prediction], classes: Sequence[str], top: int) -> str:
    """The most likely classes as text: a table per sample, a column per stream."""
    return "\n\n".join(_table(prediction, classes, top) for prediction in predictions)


def _table(prediction: Prediction, classes: Sequence[str], top: int) -> str:
    columns = [
        [name, *(f"{confidence:7.2%}  {classes[label]}" for label, confidence in ranked)]
        for name, ranked in prediction.top(top).items()
    ]
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    truth = "" if prediction.label is None else f", true class {classes[prediction.label]}"
    return "\n".join([prediction.name + truth, *rows])
