from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchvision")

from mmixer_kernels import command
from mmixer_kernels.data import collate
from mmixer_kernels.data.clips import Clip, ClipSplit, Listed
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


class Recorded(Noise):
    """A source that knows its frame rate."""

    def rate(self):
        return float(self.frames)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("frame", [0, 4]), ("span", [1, 9, 17]), ("rate", [0, 8, 16])],
)
def test_the_other_modality_is_read_at_the_first_one_s_moments(rule, expected):
    read = {}

    class Noted(Recorded):
        def read(self, indices, size):
            read[self.channels] = list(indices)
            return super().read(indices, size)

    other = 7 if rule == "frame" else 18
    clip = Clip("clip", 0, {"rgb": Noted(9), "depth": Noted(other, 1)})
    arguments = [clip], ("rgb", "depth"), Sampling(stride=4), Transform(16), 0, False
    samples = ClipSplit(*arguments, rule)
    for part in (samples, samples.plain()):
        assert part[0].length == len(expected)
        assert read == {3: expected if rule == "frame" else [0, 4, 8], 1: expected}


def test_a_list_s_number_of_frames_is_the_least():
    sources = {"rgb": Noise(9), "depth": Noise(7, 1)}
    for frames in (None, 7):
        clip = Clip("a", 0, sources, Listed("train.txt, line 3", frames))
        assert clip.track("depth").frames == 7
    clip = Clip("a", 0, sources, Listed("train.txt, line 3", 8))
    assert clip.track("rgb").frames == 9
    message = r"^train\.txt, line 3: says 8 frames, but a has 7 of depth: "
    with pytest.raises(DamagedFile, match=message):
        clip.track("depth")


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
