"""What each stream knows by itself: Eq. 15's classifiers on the frozen network (Table 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import Data
from ..data.base import Split
from ..network import StreamClassifiers
from . import metrics, mixed_precision
from .batches import batches_in_order
from .model import Recognizer
from .options import LoaderOptions
from .result import Evaluation


def evaluate_streams(
    model: Recognizer,
    data: Data,
    split: Split,
    loader: LoaderOptions,
    precision: str = "float32",
) -> list[Evaluation]:
    """A modality's confusion matrix and mean loss each, of a linear classifier on its h_T.

    The classifiers learn from the training split with Eq. 16's loss; the network stays as it is.
    The problem is convex and its inputs are computed once, so L-BFGS solves it without options.

    Args:
        precision: that of `RunOptions`, for the frozen network.
    """
    streams, labels = _frozen_streams(model, data.train, loader, precision)
    heads = StreamClassifiers(model.mixer).to(streams[0].device)
    optimizer = torch.optim.LBFGS(heads.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.stack([F.cross_entropy(x, labels) for x in heads(streams)]).sum()  # Eq. 16
        total.backward()
        return total

    optimizer.step(loss)
    streams, labels = _frozen_streams(model, split, loader, precision)
    with torch.no_grad():
        return [
            Evaluation(
                metrics.confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), len(data.classes)),
                F.cross_entropy(logits, labels).item(),
            )
            for logits in heads(streams)
        ]


@torch.no_grad()
def _frozen_streams(
    model: Recognizer, split: Split, loader: LoaderOptions, precision: str
) -> tuple[list[Tensor], Tensor]:
    """h_T of every sample, `[samples, H]` a modality, and the labels."""
    model.eval()
    device = next(model.parameters()).device
    parts, labels = [], []
    for inputs, batch_labels, lengths in batches_in_order(split, loader, device):
        with mixed_precision.autocast(device, precision):
            streams = model.streams(inputs, lengths)
        parts.append([stream.float() for stream in streams])
        labels.append(batch_labels)
    return [torch.cat(stream) for stream in zip(*parts, strict=True)], torch.cat(labels)
