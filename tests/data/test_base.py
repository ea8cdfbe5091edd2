import pytest
import torch

from mmixer_kernels.data import Sample, collate
from mmixer_kernels.data.base import draws


def sample(length, label=0):
    return Sample((torch.randn(length, 2), torch.randn(length, 3, 4)), label, length)


def test_collate_of_full_samples_has_no_lengths():
    samples = [sample(5, 1), sample(5, 2)]
    inputs, labels, lengths = collate(samples)
    assert [list(x.shape) for x in inputs] == [[2, 5, 2], [2, 5, 3, 4]]
    assert torch.equal(inputs[1][1], samples[1].inputs[1])
    assert labels.tolist() == [1, 2]
    assert labels.dtype == torch.int64
    assert lengths is None


def test_collate_pads_with_zeros():
    samples = [sample(2), sample(5), sample(3)]
    inputs, _, lengths = collate(samples)
    assert lengths.tolist() == [2, 5, 3]
    for modality, clips in enumerate(inputs):
        for row, clip in enumerate(clips):
            assert torch.equal(clip[: lengths[row]], samples[row].inputs[modality])
            assert not clip[lengths[row] :].any()


def test_collate_keeps_lengths_of_samples_padded_alike():
    padded = Sample((torch.zeros(4, 2), torch.zeros(4, 2)), 0, 3)
    assert collate([padded, padded]).lengths.tolist() == [3, 3]


def test_draws_repeat():
    assert draws(1, 2, 3, 4, 5).random() == draws(1, 2, 3, 4, 5).random()


@pytest.mark.parametrize("position", range(5))
def test_draws_differ_in_each_argument(position):
    place = [1, 2, 3, 4, 5]
    other = [value + (i == position) for i, value in enumerate(place)]
    first, second = draws(*place).random(1000), draws(*other).random(1000)
    assert len(set(first) & set(second)) == 0
