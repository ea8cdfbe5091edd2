from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchvision")

from mmixer_kernels import command
from mmixer_kernels.data import collate
from mmixer_kernels.data.clips import Clip, ClipSplit
from mmixer_kernels.data.transforms import Sampling, Transform
from mmixer_kernels.errors import DamagedFile


@dataclasses.dataclass
class Noise:
    """A source in memory whose frames' mean is their number."""

    frames: int
    channels: int = 3
    broken: bool = False

    def count(self):
        return self.frames

    def read(self, indices, size):
        if self.broken:
            raise DamagedFile("clip.avi", "is broken")
        assert list(indices) == sorted(indices)
        assert all(0 <= index < self.frames for index in indices)
        wide = torch.arange(2 * size) % 7
        frames = [wide.expand(self.channels, size, -1) + 5 * index for index in indices]
        dtype = torch.uint8 if self.channels == 3 else torch.uint16
        return torch.stack(frames).to(dtype)


def split(training=True, seed=0, **broken):
    clips = [
        Clip(f"clip {i}", i % 3, {"rgb": Noise(9 + i), "depth": Noise(20, 1, **broken)})
        for i in range(6)
    ]
    transform = Transform(16)
    return ClipSplit(clips, ("depth", "rgb"), Sampling(stride=4), transform, seed, training)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


def test_a_sample_has_the_modalities_in_order_and_its_own_length():
    samples = split(training=False)
    assert len(samples) == 6
    assert samples.labels.tolist() == [0, 1, 2, 0, 1, 2]
    lengths = [samples[i].length for i in range(6)]
    assert lengths == [3, 3, 3, 3, 4, 4]
    for index, length in enumerate(lengths):
        sample = samples[index]
        assert [x.shape for x in sample.inputs] == [(length, 3, 16, 16)] * 2
        assert sample.label == index % 3
        rgb = sample.inputs[1].mean((1, 2, 3))
        assert (rgb.diff() > 0).all()
    # Depth spreads every frame alike, so its numbers are gone and its frames are equal.
    assert torch.equal(samples[0].inputs[0][0], samples[0].inputs[0][1])


def test_training_draws_depend_on_seed_epoch_and_index_alone():
    one, other = split(), split()
    for index in (3, 0, 5):
        assert equal(one[index], other[index])
        assert equal(one[index], one[index])
    first = one[2]
    one.set_epoch(1)
    assert not equal(one[2], first)
    one.set_epoch(0)
    assert equal(one[2], first)
    assert not equal(split(seed=1)[2], first)


def test_evaluation_never_changes():
    samples = split(training=False)
    first = samples[2]
    samples.set_epoch(1)
    assert equal(samples[2], first)
    assert equal(split(training=False, seed=1)[2], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    samples = split()
    loader = DataLoader(samples, batch_size=3, collate_fn=collate, num_workers=workers)
    expected = [collate([samples[i] for i in part]) for part in ((0, 1, 2), (3, 4, 5))]
    for batch, other in zip(loader, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.inputs, other.inputs, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_a_command_in_one_line(workers, capsys):
    loader = DataLoader(split(broken=True), collate_fn=collate, num_workers=workers)

    def body():
        return len(list(loader))

    assert command.run(body) == 2
    assert capsys.readouterr().err == "error: clip.avi: is broken\n"
