from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from mmixer_kernels.data.base import draws
from mmixer_kernels.data.transforms import (
    MEAN,
    STD,
    Sampling,
    Transform,
    eight_bits,
    jet,
    normalized,
)


@pytest.mark.parametrize(
    ("options", "count", "indices"),
    [
        ({}, 20, [0, 8, 16]),
        ({}, 16, [0, 8]),
        ({}, 1, [0]),
        ({"stride": 3}, 7, [0, 3, 6]),
        ({"frames": 4}, 40, [5, 15, 25, 35]),
        ({"frames": 4}, 4, [0, 1, 2, 3]),
        ({"frames": 4}, 2, [0, 0, 1, 1]),
        ({"frames": 3}, 1, [0, 0, 0]),
        ({"frames": 1}, 9, [4]),
    ],
)
def test_sampling(options, count, indices):
    assert Sampling(**options)(count) == indices


@pytest.mark.parametrize("count", [1, 5, 16, 37, 300])
def test_evenly_spaced_frames_are_in_the_clip(count):
    indices = Sampling(frames=16)(count)
    assert len(indices) == 16
    assert indices == sorted(indices)
    assert 0 <= indices[0] == count - 1 - indices[-1]
    assert max(np.diff(indices)) - min(np.diff(indices)) <= 1


def depth(*values):
    return torch.tensor(values, dtype=torch.int32).to(torch.uint16)[:, None, None]


def test_every_frame_is_spread_over_eight_bits():
    pictures = depth([500, 1500, 2500], [0, 40_000, 65_535])
    assert eight_bits(pictures)[:, 0, 0].tolist() == [[0, 128, 255], [0, 156, 255]]


def test_a_frame_of_one_value_is_the_first_colour():
    pictures = depth([700, 700], [0, 0])
    assert eight_bits(pictures)[:, 0, 0].tolist() == [[0, 0], [0, 0]]


def test_a_fixed_maximum_is_the_same_for_all_frames():
    pictures = depth([0, 2500, 5000], [1000, 1000, 9000])
    assert eight_bits(pictures, 5000)[:, 0, 0].tolist() == [[0, 128, 255], [51, 51, 255]]


def test_jet_is_rgb_from_dark_blue_to_dark_red():
    colours = jet(torch.tensor([[[[0, 64, 128, 191, 255]]]], dtype=torch.uint8))
    assert colours.shape == (1, 3, 1, 5)
    assert colours[0, :, 0].T.tolist() == [
        [0, 0, 128],
        [0, 129, 255],
        [130, 255, 125],
        [255, 128, 0],
        [128, 0, 0],
    ]


def test_normalisation_is_imagenets():
    grey = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
    expected = [(0.2 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    np.testing.assert_allclose(normalized(grey).flatten(), expected, rtol=1e-6)
    assert MEAN == (0.485, 0.456, 0.406)
    assert STD == (0.229, 0.224, 0.225)


SIZE = 56
PLAIN = Transform(SIZE, flip=0.0, jitter=0.0)
READ = PLAIN.read_size


def places(width, frames=2):
    """Pictures whose red is the column and whose green is the row."""
    picture = torch.zeros(frames, 3, READ, width, dtype=torch.uint8)
    picture[:, 0] = torch.arange(width)
    picture[:, 1] = torch.arange(READ)[:, None]
    return picture


def corner(inputs):
    """(row, column, step) of the first pixel, and of the next column, of each frame."""
    scale = 255 * torch.tensor(STD)[:, None, None]
    pixels = (inputs * scale + 255 * torch.tensor(MEAN)[:, None, None]).round().int()
    left, right, top = pixels[:, 0, 0, 0], pixels[:, 0, 0, 1], pixels[:, 1, 0, 0]
    frames = {(int(t), int(x), int(y - x)) for t, x, y in zip(top, left, right, strict=True)}
    assert len(frames) == 1
    return frames.pop()


def test_frames_are_read_at_256_for_224():
    assert Transform().read_size == 256
    assert (SIZE, READ) == (56, 64)


def test_evaluation_crops_the_centre():
    wide, square = Transform(SIZE)({"rgb": places(100), "other": places(64)}, None)
    assert wide.shape == square.shape == (2, 3, SIZE, SIZE)
    assert wide.dtype == torch.float32
    assert corner(wide) == (4, 22, 1)
    assert corner(square) == (4, 4, 1)


def test_one_crop_is_shared_by_frames_and_modalities():
    tops, shares = set(), set()
    for index in range(60):
        frames = {"rgb": places(100), "other": places(64)}
        wide, square = PLAIN(frames, draws(0, 0, 0, index))
        (top, left, step), (square_top, square_left, _) = corner(wide), corner(square)
        assert (top, step) == (square_top, 1)
        assert left / 44 == pytest.approx(square_left / 8, abs=0.08)
        tops.add(top)
        shares.add(left)
    assert tops == set(range(9))
    assert min(shares) <= 3
    assert max(shares) >= 41


def test_one_flip_is_shared_by_frames_and_modalities():
    flips = []
    for index in range(200):
        frames = {"rgb": places(100), "other": places(64)}
        inputs = Transform(SIZE, jitter=0.0)(frames, draws(0, 0, 0, index))
        steps = {corner(x)[2] for x in inputs}
        assert len(steps) == 1
        flips.append(steps.pop() == -1)
    assert 70 < sum(flips) < 130
    mirrored = Transform(SIZE, flip=1.0, jitter=0.0)({"rgb": places(64)}, draws(0, 0, 0, 0))[0]
    plain = PLAIN({"rgb": places(64)}, draws(0, 0, 0, 0))[0]
    assert torch.equal(mirrored, plain.flip(-1))


def test_jitter_is_on_rgb_alone_and_the_same_for_all_frames():
    random = np.random.default_rng(0)
    frames = {
        "rgb": torch.from_numpy(random.integers(60, 180, (1, 3, READ, 80), np.uint8)).repeat(
            2, 1, 1, 1
        ),
        "depth": torch.from_numpy(random.integers(0, 4000, (2, 1, READ, 80), np.uint16)),
        "ir": torch.from_numpy(random.integers(0, 255, (2, 1, READ, 80), np.uint8)),
    }
    jittered, plain = Transform(SIZE, flip=0.0, jitter=0.4), PLAIN
    brightness = []
    for index in range(20):
        before = plain(frames, draws(0, 0, 0, index))
        after = jittered(frames, draws(0, 0, 0, index))
        assert (after[0] - before[0]).abs().max() > 0.01
        assert torch.equal(after[0][0], after[0][1])
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[2], before[2])
        brightness.append(float((after[0] - before[0]).mean()))
    assert min(brightness) < -0.2
    assert max(brightness) > 0.2
    without = jittered(frames, None)
    assert torch.equal(without[0], plain(frames, None)[0])


def test_depth_is_spread_before_the_crop():
    frames = torch.full((1, 1, READ, READ), 1000, dtype=torch.int32)
    frames[0, 0, 0, 0] = 0
    frames[0, 0, -1, -1] = 4000
    inputs = Transform(SIZE)({"depth": frames.to(torch.uint16)}, None)[0]
    expected = normalized(jet(torch.full((1, 1, SIZE, SIZE), 64, dtype=torch.uint8)))
    assert torch.equal(inputs, expected)
    fixed = Transform(SIZE, maximum={"depth": 2000})
    inputs = fixed({"depth": frames.to(torch.uint16)}, None)[0]
    expected = normalized(jet(torch.full((1, 1, SIZE, SIZE), 128, dtype=torch.uint8)))
    assert torch.equal(inputs, expected)


def test_8_bits_end_at_255_whatever_the_sensor_s_maximum():
    frames = torch.full((1, 1, READ, READ), 51, dtype=torch.uint8)
    inputs = Transform(SIZE, maximum={"depth": 5000})({"depth": frames}, None)[0]
    assert torch.equal(inputs, normalized(jet(torch.full((1, 1, SIZE, SIZE), 51).byte())))


def test_frames_of_another_size_are_resized():
    inputs = Transform(32)({"rgb": places(100)}, None)[0]
    assert inputs.shape == (2, 3, 32, 32)
    top, left, step = corner(inputs)
    assert top in (4, 5)
    assert left in (22, 23)
    assert step in (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(stride=0), "stride must be 1 or more, but is 0"),
        (lambda: Sampling(frames=0), "frames must be 1 or more, but is 0"),
        (lambda: Transform(image_size=7), "image_size must be 8 or more, but is 7"),
        (lambda: Transform(flip=1.5), r"flip must be in 0..1, but is 1.5"),
        (lambda: Transform(jitter=-0.1), r"jitter must be in 0..1, but is -0.1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
