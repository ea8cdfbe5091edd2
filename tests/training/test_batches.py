from __future__ import annotations

import signal
import threading

import pytest
import torch

from mmixer_kernels.data import DamagedFile, Sample, Split
from mmixer_kernels.training import batches

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalsIgnored(Split):
    """A class label of the number of signals that are ignored."""

    def __getitem__(self, index: int) -> Sample:
        ignored = sum(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
        return Sample((torch.zeros(3),), ignored, 3)


@pytest.mark.parametrize(("workers", "ignored"), [(0, 0), (1, 2)])
def test_workers_leave_signals_to_the_training_process(workers: int, ignored: int) -> None:
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    try:
        split = SignalsIgnored(torch.zeros(2, dtype=torch.int64))
        (batch,) = batches.load(split, [[0, 1]], workers)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert batch.labels.tolist() == [ignored, ignored]


def test_epochs_have_orders_of_their_own_and_every_sample_once() -> None:
    first, second = (batches.shuffled(10, 4, seed=0, epoch=epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(index for batch in first for index in batch) == list(range(10))
    assert first != second
    assert first == batches.shuffled(10, 4, seed=0, epoch=0)
    assert second != batches.shuffled(10, 4, seed=1, epoch=0)


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_are_slices_of_nearly_equal_size(samples: int, world: int) -> None:
    batch = list(range(5, 5 + samples))
    shares = [batches.share(batch, rank, world) for rank in range(world)]
    assert [index for share in shares for index in share] == batch
    assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1


LABELS = torch.tensor([0] * 40 + [1] * 7 + [3] * 2)


def test_balanced_epochs_have_each_class_equally_and_its_samples_too() -> None:
    epochs = [batches.balanced(LABELS, 8, seed=0, epoch=epoch) for epoch in (0, 1)]
    for drawn in epochs:
        assert [len(batch) for batch in drawn] == [8] * 6 + [1]
        indices = torch.tensor([index for batch in drawn for index in batch])
        assert len(indices.unique()) == 49  # no repetition has another's number
        samples = indices % 49
        counts = LABELS[samples].bincount()
        assert sorted(counts.tolist()) == [0, 16, 16, 17]
        for label in (0, 1, 3):
            times = samples.bincount(minlength=49)[label == LABELS]
            assert times.max() - times.min() <= 1
    assert epochs[0] != epochs[1]
    assert epochs[0] == batches.balanced(LABELS, 8, seed=0, epoch=0)
    assert epochs[1] != batches.balanced(LABELS, 8, seed=1, epoch=1)


def test_balanced_epochs_are_in_no_order_of_classes_and_go_through_the_frequent_ones() -> None:
    seen: set[int] = set()
    for epoch in range(12):
        drawn = [i % 49 for batch in batches.balanced(LABELS, 8, 0, epoch) for i in batch]
        seen |= set(drawn)
        halves = LABELS[drawn[:24]].bincount(minlength=4), LABELS[drawn[24:]].bincount(minlength=4)
        assert all((half[[0, 1, 3]] > 0).all() for half in halves)
    assert seen == set(range(49))


class Epochs(Split):
    """Samples that carry the epoch that they are drawn in."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        return Sample((torch.tensor([float(index)]), torch.tensor([float(self.epoch)])), 7, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_repeated_sample_is_drawn_anew(workers: int) -> None:
    split = Epochs(torch.zeros(5, dtype=torch.int64))
    split.set_epoch(3)
    order = [[4, 9], [14, 0]]
    first, second = batches.load(batches.Repeats(split, 3), order, workers)
    assert [*first.inputs[0].flatten(), *second.inputs[0].flatten()] == [4, 4, 4, 0]
    most = batches.MOST_EPOCHS
    drawn = [*first.inputs[1].flatten().tolist(), *second.inputs[1].flatten().tolist()]
    assert drawn == [3, float(torch.tensor(3.0 + most)), float(torch.tensor(3.0 + 2 * most)), 3]
    assert split.epoch == 3


class Numbers(Split):
    """Samples whose input is their index; the third is damaged."""

    def __getitem__(self, index: int) -> Sample:
        if index == 2:
            raise DamagedFile("clip.avi", "is cut off")
        return Sample((torch.full((1, 1), float(index)),), 0, 1)


def test_a_batch_is_loaded_while_the_one_before_is_worked_on() -> None:
    loading = threading.Event()

    class Told(Numbers):
        def __getitem__(self, index: int) -> Sample:
            if index == 1:
                loading.set()
            return super().__getitem__(index)

    loaded = batches.load(Told(torch.zeros(2, dtype=torch.int64)), [[0], [1]], workers=0)
    next(loaded)
    assert loading.wait(timeout=60)


def test_a_loader_s_error_comes_where_its_sample_is_due() -> None:
    split = Numbers(torch.zeros(4, dtype=torch.int64))
    loaded = batches.load(split, [[0], [1], [2], [3]], workers=0)
    assert [next(loaded).inputs[0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(DamagedFile, match=r"clip\.avi: is cut off"):
        next(loaded)


def test_no_thread_of_a_loader_outlives_it() -> None:
    before = threading.active_count()
    loaded = batches.load(Numbers(torch.zeros(2, dtype=torch.int64)), [[0], [1]], workers=0)
    next(loaded)
    assert threading.active_count() == before + 1
    loaded.close()
    assert threading.active_count() == before
