"""Samples and a network's predictions for them, as a PNG file (the paper's Figure 5)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..atomic import replacing
from ..data import Data
from ..data.transforms import MEAN, STD
from .predictions import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, OTHER = "tab:green", "tab:red", "0.45"
FRAMES = 6
"""Greatest number of frames that are shown of a clip."""
LETTERS = 40
"""Letters per line of a column."""
CURVES = 16
"""Greatest number of features that are drawn as curves; more are drawn as an image."""


def write(path: Path, predictions: Sequence[Prediction], data: Data, top: int) -> None:
    """Draws `figure` in a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = figure(predictions, data, top)
    with replacing(path) as file:
        drawn.savefig(file, format="png", dpi=150, bbox_inches="tight")


def figure(predictions: Sequence[Prediction], data: Data, top: int) -> Figure:
    """A figure with a row per sample: the modalities' frames (or signals), and each stream's `top`
    classes.

    A stream's first class is green where it is the sample's, and red where it is not; the
    sample's own class is green in other places too. Without a known class all are black and grey.
    """
    from matplotlib.figure import Figure

    modalities = len(data.modalities)
    streams = len(predictions[0].confidences)
    height = max(1.1 * modalities, 0.4 + 0.17 * (top + 1))
    drawn = Figure(figsize=(6 + 2.7 * streams, height * len(predictions)), layout="constrained")
    rows = drawn.subfigures(len(predictions), 1, squeeze=False)[:, 0]
    for row, prediction in zip(rows, predictions, strict=True):
        truth = "" if prediction.label is None else f": {data.classes[prediction.label]}"
        row.suptitle(prediction.name + truth, fontsize=9, x=0.01, ha="left")
        left, right = row.subfigures(1, 2, width_ratios=(6, 2.7 * streams))
        axes = left.subplots(modalities, 1, squeeze=False)[:, 0]
        for axis, (modality, clip) in zip(axes, prediction.inputs.items(), strict=True):
            _draw(axis, clip, normalized=data.extractors is None)
            axis.set_ylabel(modality, fontsize=8)
        columns = right.subplots(1, streams, squeeze=False)[0]
        for axis, (name, ranked) in zip(columns, prediction.top(top).items(), strict=True):
            axis.axis("off")
            axis.set_title(name, fontsize=9, loc="left")
            for rank, (label, confidence) in enumerate(ranked):
                axis.text(
                    0,
                    1 - (rank + 0.5) / top,
                    textwrap.fill(f"{data.classes[label]} ({100 * confidence:.2f})", LETTERS),
                    color=colour(rank, label, prediction.label),
                    fontsize=9 if rank == 0 else 8,
                    va="center",
                )
    return drawn


def colour(rank: int, label: int, truth: int | None) -> str:
    """The colour of a class that a stream ranks so, from 0."""
    if truth is None:
        return "black" if rank == 0 else OTHER
    if label == truth:
        return RIGHT
    return WRONG if rank == 0 else OTHER


def _draw(axis: Axes, clip: Tensor, normalized: bool) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if clip.ndim == 4:
        axis.imshow(strip(clip, normalized).numpy(), cmap="gray", vmin=0, vmax=1)
    elif clip.shape[1] <= CURVES:
        axis.plot(clip.numpy(), linewidth=0.8)
        axis.margins(x=0)
    else:
        axis.imshow(clip.T.numpy(), aspect="auto", cmap="viridis")


def strip(clip: Tensor, normalized: bool) -> Tensor:
    """A strip of evenly spaced frames of a clip `[T, C, h, w]`, in 0..1: `[h, n w, 3]`, or
    `[h, n w]` of one channel.

    Args:
        normalized: the clip has ImageNet's mean and deviation, which are undone.
    """
    chosen = torch.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().long()
    frames = clip[chosen]
    if normalized:
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        frames = frames * deviation + mean
    side_by_side = torch.cat(list(frames.clamp(0, 1)), dim=-1)
    return side_by_side[0] if len(side_by_side) == 1 else side_by_side.permute(1, 2, 0)
