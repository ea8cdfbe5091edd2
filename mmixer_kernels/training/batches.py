"""The samples of a step, the share of them that a process takes, and their loading."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Batch, Split, collate
from .options import LoaderOptions


def shuffled(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of an epoch's batches, in an order of their own for every (seed, epoch)."""
    entropy = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).view(np.int64)
    generator = torch.Generator().manual_seed(int(entropy[0]))
    order = torch.randperm(samples, generator=generator)
    return [part.tolist() for part in order.split(batch_size)]


def in_order(samples: int, batch_size: int) -> list[list[int]]:
    """The indices of every sample's batch, once and in order."""
    return [part.tolist() for part in torch.arange(samples).split(batch_size)]


def share(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """A process's part of a batch: parts differ by one sample at most, and may be empty."""
    start, stop = (-(-len(batch) * part // world) for part in (rank, rank + 1))
    return list(batch[start:stop])


def load(split: Split, batches: Sequence[list[int]], workers: int) -> Iterator[Batch]:
    """Yields the samples of each list of indices, side by side.

    They are loaded while the batches before are worked on: by `workers` processes, or by a thread
    of this one.
    """
    # A loader without a generator of its own draws from the one that dropout uses.
    loader: DataLoader[Any] = DataLoader(
        split,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )
    yield from loader if workers else _ahead(loader)


def _ahead(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yields what the loader does, whose next batch a thread makes meanwhile."""
    batches = iter(loader)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def batches_in_order(
    split: Split, loader: LoaderOptions, device: torch.device
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """Yields inputs, labels and lengths of every sample of a split, once and in its order."""
    for batch in load(split, in_order(len(split), loader.batch_size), loader.workers):
        yield to_device(batch, device)


def to_device(batch: Batch, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The batch's inputs, labels and lengths on a device."""
    lengths = None if batch.lengths is None else batch.lengths.to(device)
    return [x.to(device) for x in batch.inputs], batch.labels.to(device), lengths


def _ignore_signals(worker: int) -> None:
    """Leaves signals to the training process: Ctrl-C reaches every process of a terminal, and
    torchrun's SIGTERM the whole group. Workers end when that process does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
