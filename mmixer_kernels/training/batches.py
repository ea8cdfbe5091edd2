"""The samples of a step, the share of them that a process takes, and their loading."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Batch, Sample, Split, collate
from .options import LoaderOptions

MOST_EPOCHS = 1 << 32
"""The epochs that a training may have before those that are for repetitions."""


def shuffled(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of an epoch's batches, in an order of their own for every (seed, epoch)."""
    return _divided(torch.randperm(samples, generator=_generator(seed, epoch)), batch_size)


def balanced(labels: Tensor, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of an epoch's batches, as many as there are labels, in which each class that has
    samples is equally frequent, but for one; determined by (seed, epoch).

    A class's samples are gone through in random orders, one after another: in an epoch each comes
    as often as any other of its class, but for one. Index `i + r * len(labels)` is sample i for the
    r-th time after its first, as `Repeats` reads it.
    """
    generator = _generator(seed, epoch)
    present = labels.unique()
    share, more = divmod(len(labels), len(present))
    favoured = torch.randperm(len(present), generator=generator)[:more]
    counts = torch.full((len(present),), share)
    counts[favoured] += 1
    drawn = []
    for label, count in zip(present, counts.tolist(), strict=True):
        own = (labels == label).nonzero()[:, 0]
        for repeat in range(-(-count // len(own))):
            order = own[torch.randperm(len(own), generator=generator)]
            drawn.append(order[: count - repeat * len(own)] + repeat * len(labels))
    order = torch.cat(drawn)
    return _divided(order[torch.randperm(len(order), generator=generator)], batch_size)


def in_order(samples: int, batch_size: int) -> list[list[int]]:
    """The indices of every sample's batch, once and in order."""
    return _divided(torch.arange(samples), batch_size)


def share(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """A process's part of a batch: parts differ by one sample at most, and may be empty."""
    start, stop = (-(-len(batch) * part // world) for part in (rank, rank + 1))
    return list(batch[start:stop])


class Repeats(Split):
    """A split whose samples come several times in an epoch, as `balanced` draws them: a repetition
    is the sample of an epoch of its own, so that augmentation varies it too.

    Args:
        split: one that has the same samples in every epoch.
        epoch: the epoch that it is set to.
    """

    def __init__(self, split: Split, epoch: int) -> None:
        super().__init__(split.labels)
        self.split, self.epoch = split, epoch
        self.repeated = copy.copy(split)  # `split` itself stays at the epoch

    def __getitem__(self, index: int) -> Sample:
        repeat, index = divmod(index, len(self.labels))
        if not repeat:
            return self.split[index]
        self.repeated.set_epoch(self.epoch + repeat * MOST_EPOCHS)
        return self.repeated[index]


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


def _generator(seed: int, epoch: int) -> torch.Generator:
    entropy = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).view(np.int64)
    return torch.Generator().manual_seed(int(entropy[0]))


def _divided(order: Tensor, batch_size: int) -> list[list[int]]:
    return [part.tolist() for part in order.split(batch_size)]


def _ignore_signals(worker: int) -> None:
    """Leaves signals to the training process: Ctrl-C reaches every process of a terminal, and
    torchrun's SIGTERM the whole group. Workers end when that process does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
