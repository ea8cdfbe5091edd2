"""The knowledge of each stream by itself: Eq. 15's classifiers on the frozen network (Table 4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Data
from ..data.base import Split
from ..errors import UserError
from ..network import StreamClassifiers
from ..training import checkpoint, metrics, mixed_precision
from ..training.batches import batches_in_order
from ..training.model import Recognizer
from ..training.options import LoaderOptions
from ..training.result import Evaluation

WEIGHT_DECAY = 1e-4
"""Factor of half the squared norm of the classifiers' weights, which is added to their loss."""


def train_heads(
    model: Recognizer, data: Data, loader: LoaderOptions, precision: str = "float32"
) -> StreamClassifiers:
    """A linear classifier on each modality's h_T, learnt with Eq. 16's loss from the training
    samples without augmentation; the network stays as it is.

    The problem is convex and its inputs are computed once, so L-BFGS solves it without options; it
    starts at zero weights, so that equal inputs give equal classifiers. WEIGHT_DECAY is added to
    Eq. 16: where h_T separates the training samples' classes the sum alone has no minimum, and
    every confidence would be 1.

    Args:
        model: the network, which stays as it is.
        data: its data set.
        loader: the size of a batch, and the workers.
        precision: that of `RunOptions`, for the frozen network.
    """
    streams, labels = _frozen_streams(model, data.train.plain(), loader, precision)
    heads = StreamClassifiers(model.mixer).to(streams[0].device)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(heads.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.stack([F.cross_entropy(x, labels) for x in heads(streams)]).sum()  # Eq. 16
        squares = torch.stack([weight.square().sum() for weight in heads.parameters()])
        total = total + WEIGHT_DECAY / 2 * squares.sum()
        total.backward()
        return total

    optimizer.step(loss)
    return heads


@torch.no_grad()
def evaluate_streams(
    model: Recognizer,
    heads: StreamClassifiers,
    split: Split,
    loader: LoaderOptions,
    precision: str = "float32",
) -> list[Evaluation]:
    """The evaluation of each modality's classifier on a split: confusion matrix and mean loss."""
    model.eval()
    device, classes = next(model.parameters()).device, model.mixer.classifier.out_features
    confusions = [torch.zeros(classes, classes, dtype=torch.int64) for _ in heads.weights]
    losses: list[list[float]] = [[] for _ in heads.weights]
    for inputs, labels, lengths in batches_in_order(split, loader, device):
        with mixed_precision.autocast(device, precision):
            streams = model.streams(inputs, lengths)
        for place, logits in enumerate(stream_logits(heads, streams)):
            predicted = logits.argmax(1).cpu()
            confusions[place] += metrics.confusion_matrix(labels.cpu(), predicted, classes)
            losses[place].append(F.cross_entropy(logits, labels, reduction="sum").item())
    return [
        Evaluation(confusion, math.fsum(sums) / len(split))
        for confusion, sums in zip(confusions, losses, strict=True)
    ]


def stream_logits(heads: StreamClassifiers, streams: Sequence[Tensor]) -> list[Tensor]:
    """The logits `[B, K]` of each modality's classifier, in float32, for streams `[B, H]` of any
    dtype (Eq. 15)."""
    return heads([stream.float() for stream in streams])


def heads_path(path: Path) -> Path:
    """The path of the classifiers of a checkpoint's streams: best.streams.pt beside best.pt."""
    return path.with_suffix(".streams.pt")


def save_heads(heads: StreamClassifiers, model: Recognizer, path: Path) -> None:
    """Writes the classifiers of the network whose checkpoint is `path` beside it."""
    state = {"streams": heads.state_dict(), "network": _digest(model)}
    checkpoint.save(state, heads_path(path))


def load_heads(model: Recognizer, path: Path) -> StreamClassifiers | None:
    """The classifiers that `save_heads` wrote beside the checkpoint `path`; None without any.

    Raises:
        UserError: the file is damaged, or belongs to other weights.
    """
    beside = heads_path(path)
    if not beside.exists():
        return None
    state = checkpoint.load(beside)
    if state.get("network") != _digest(model):
        raise UserError(
            f"{beside} belongs to other weights than {path}: make it anew with "
            f"python -m mmixer_kernels.evaluate {path} --streams, or remove it"
        )
    heads = StreamClassifiers(model.mixer)
    heads.load_state_dict(state["streams"])
    return heads.to(next(model.parameters()).device)


def _digest(model: Recognizer) -> str:
    """The SHA-256 of all weights and statistics of a network."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _frozen_streams(
    model: Recognizer, split: Split, loader: LoaderOptions, precision: str
) -> tuple[list[Tensor], Tensor]:
    """The states h_T of every sample, `[samples, H]` per modality, and the labels."""
    model.eval()
    device = next(model.parameters()).device
    parts, labels = [], []
    for inputs, batch_labels, lengths in batches_in_order(split, loader, device):
        with mixed_precision.autocast(device, precision):
            streams = model.streams(inputs, lengths)
        parts.append([stream.float() for stream in streams])
        labels.append(batch_labels)
    return [torch.cat(stream) for stream in zip(*parts, strict=True)], torch.cat(labels)
