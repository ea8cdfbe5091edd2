"""A network's predictions for single samples, by stream and all together (Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import ArraysOptions, Split, collate
from ..data.clips import ClipSplit
from ..data.loose import clips_of
from ..data.video import VideoOptions
from ..errors import UserError, user_errors
from ..network import StreamClassifiers
from ..training.model import Recognizer
from . import streams
from .restore import Restored


@dataclass(frozen=True)
class Prediction:
    """A sample and its classes' confidences.

    Shapes: `inputs` `[T, ...]` per modality; `confidences` `[K]` by stream: each modality's where
    there are classifiers of the streams, and last the whole network's, named as `rgb+depth`.
    """

    name: str
    label: int | None
    inputs: dict[str, Tensor]
    confidences: dict[str, Tensor]

    def top(self, count: int) -> dict[str, list[tuple[int, float]]]:
        """The `count` most likely classes of each stream with their confidences, best first."""
        best = {
            name: values.topk(min(count, len(values))) for name, values in self.confidences.items()
        }
        return {
            name: list(zip(indices.tolist(), values.tolist(), strict=True))
            for name, (values, indices) in best.items()
        }


def of_files(restored: Restored, path: Path, files: Sequence[Path]) -> list[Prediction]:
    """Predictions for samples that are given file by file: those of video as `data/loose.py` has
    it, and those of arrays as `data/arrays.py` has it, with labels or without.

    Args:
        restored: the network; its data set needs no samples.
        path: the checkpoint's path; classifiers of the streams are used where they are beside it.

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
    return [
        prediction
        for name, split in splits
        for prediction in _predict(restored, path, split, range(len(split)), name)
    ]


def of_split(restored: Restored, path: Path, part: str, indices: Sequence[int]) -> list[Prediction]:
    """Predictions for samples of the data set, by their places in a split.

    Args:
        path: as in `of_files`.
        part: "train" (without augmentation), "validation" or "test".

    Raises:
        UserError: an index out of its range.
    """
    split: Split = getattr(restored.data, part).plain()
    for index in indices:
        if not 0 <= index < len(split):
            raise UserError(f"--index must be in 0..{len(split) - 1} for {part}, but is {index}")
    return _predict(restored, path, split, indices, part)


def _predict(
    restored: Restored, path: Path, split: Split, indices: Sequence[int], part: str
) -> list[Prediction]:
    heads = streams.load_heads(restored.model, path)
    names = restored.data.modalities
    predictions = []
    for index in indices:
        sample = split[index]
        name = split.clips[index].name if isinstance(split, ClipSplit) else f"{part} {index}"
        label = sample.label if sample.label >= 0 else None
        inputs = dict(zip(names, sample.inputs, strict=True))
        batch = collate([sample])
        confidences = _confidences(restored.model, heads, names, batch.inputs)
        predictions.append(Prediction(name, label, inputs, confidences))
    return predictions


@torch.no_grad()
def _confidences(
    model: Recognizer,
    heads: StreamClassifiers | None,
    modalities: Sequence[str],
    inputs: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The confidences `[K]` of each stream for one sample, by Eq. 15 and Eq. 5."""
    device = next(model.parameters()).device
    states = model.streams([x.to(device) for x in inputs])
    logits = {}
    if heads is not None:
        logits = dict(zip(modalities, heads(states), strict=True))
    logits["+".join(modalities)] = model.mixer.classifier(torch.cat(states, dim=-1))
    return {name: values[0].softmax(-1).cpu() for name, values in logits.items()}


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
