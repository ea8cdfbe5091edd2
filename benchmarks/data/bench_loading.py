"""The converted form of a data set beside its raw files, on generated clips of NTU's sizes.

RGB is an AVI of 1920x1080 at about the bit rate of NTU's (136 GB in 56,880 clips), IR one of
512x424, masked depth a folder of 16-bit PNGs of 512x424. Each has 103 frames, of which the stride
of 8 takes 13. All files are in the page cache. One thread works, so a rate is that of a core.

Before anything is timed, each converted frame must be nearest to the raw frame of its number.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from conftest import Compare
from torch import Tensor, nn

from mmixer_kernels import MMixer
from mmixer_kernels.comparison import timing
from mmixer_kernels.comparison.timing import Contender, Times
from mmixer_kernels.data import Ntu60Options, collate, convert
from mmixer_kernels.data.clips import Clip, ClipSplit
from mmixer_kernels.data.transforms import Sampling
from mmixer_kernels.training.model import Recognizer

FRAMES = 103
RGB_SIZE, KINECT_SIZE = (1080, 1920), (424, 512)
BIT_RATE = {"rgb": 6_900_000, "ir": 1_500_000}
NAMES = ("S001C001P001R001A001", "S001C001P002R001A002", "S001C001P003R001A003")
"""One clip each to validate on, train on and test on."""
MODALITIES = ("rgb", "depth", "ir")
TOLERANCE = {"rgb": 0.03, "ir": 0.03, "depth": 0.0}
"""Largest ||x - raw|| / ||raw|| of a frame."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    first, *others = NAMES
    _write_video(root / f"{first}_rgb.avi", RGB_SIZE, BIT_RATE["rgb"])
    _write_video(root / f"{first}_ir.avi", KINECT_SIZE, BIT_RATE["ir"])
    _write_depth(root / first)
    for name in others:
        for modality in ("rgb", "ir"):
            shutil.copy(root / f"{first}_{modality}.avi", root / f"{name}_{modality}.avi")
        shutil.copytree(root / first, root / name)
    return root


@pytest.fixture(scope="module")
def converted(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    options = Ntu60Options(modalities=MODALITIES)
    assert convert.prepare(options, raw, folder, 256, 95, 256, workers=1).complete
    return folder


@pytest.mark.parametrize("modality", MODALITIES)
def test_read(compare: Compare, raw: Path, converted: Path, modality: str) -> None:
    ours, theirs = (_clips(root)[0].sources[modality] for root in (converted, raw))
    indices = Sampling()(theirs.count())
    error = _check_frames(raw, converted, modality)

    def shares(times: Times) -> dict[str, str]:
        return _rates(times["converted"], times["raw"])

    contenders = [
        Contender("converted", lambda: ours.read(indices, 256)),
        Contender("raw", lambda: theirs.read(indices, 256)),
    ]
    case = f"{modality}, {len(indices)} of {FRAMES} frames"
    compare("Reading a clip", case, contenders, threads=1, error=error, shares=shares)


@pytest.mark.parametrize("modalities", [("rgb", "depth"), MODALITIES], ids="+".join)
def test_load(compare: Compare, raw: Path, converted: Path, modalities: tuple[str, ...]) -> None:
    ours, theirs = (_training(root, modalities) for root in (converted, raw))
    error = max(_check_frames(raw, converted, modality) for modality in modalities)

    def shares(times: Times) -> dict[str, str]:
        return _rates(times["converted"], times["raw"])

    contenders = [
        Contender("converted", lambda: collate([ours[0]])),
        Contender("raw", lambda: collate([theirs[0]])),
    ]
    table = "Loading a training sample: reading, augmentation, normalisation"
    compare(table, "+".join(modalities), contenders, threads=1, error=error, shares=shares)


@pytest.mark.parametrize("modalities", [("rgb", "depth"), MODALITIES], ids="+".join)
def test_convert(
    compare: Compare,
    raw: Path,
    converted: Path,
    tmp_path_factory: pytest.TempPathFactory,
    modalities: tuple[str, ...],
) -> None:
    error = max(_check_frames(raw, converted, modality) for modality in modalities)
    options = Ntu60Options(modalities=modalities)

    def run() -> None:
        folder = tmp_path_factory.mktemp("again")
        assert convert.prepare(options, raw, folder, 256, 95, 256, workers=1).complete

    def shares(times: Times) -> dict[str, str]:
        seconds = median(times["converter"]) / len(NAMES)
        hours = 56_880 * seconds / 3600
        return {
            "samples/s": f"{1 / seconds:.2f}",
            "core-hours for NTU 60's 56,880": f"{hours:.1f}",
        }

    table = "The converter: decoding, resizing, encoding, writing and verifying"
    contenders = [Contender("converter", run)]
    compare(table, "+".join(modalities), contenders, threads=1, error=error, shares=shares)


@pytest.mark.parametrize("modalities", [("rgb", "depth")], ids="+".join)
def test_data_wait(
    compare: Compare, raw: Path, converted: Path, modalities: tuple[str, ...]
) -> None:
    """The time that a training with one thread and no loader process waits for its samples."""
    error = max(_check_frames(raw, converted, modality) for modality in modalities)
    ours, theirs = (_training(root, modalities) for root in (converted, raw))
    network = Recognizer([ResNet18() for _ in modalities], MMixer([512] * len(modalities), 60))
    adam = torch.optim.Adam(network.parameters(), lr=1e-4)
    batch = collate([ours[0]])

    def step() -> None:
        loss = nn.functional.cross_entropy(network(batch.inputs), batch.labels)
        adam.zero_grad()
        loss.backward()
        adam.step()

    def shares(times: Times) -> dict[str, str]:
        seconds = {name: median(x) for name, x in times.items()}
        answer = {"step, s a sample": f"{seconds['step']:.2f}"}
        for form in ("converted", "raw"):
            share = seconds[form] / (seconds[form] + seconds["step"])
            answer[f"data wait, {form}"] = f"{share:.1%}"
        return answer

    contenders = [
        Contender("step", step),
        Contender("converted", lambda: collate([ours[0]])),
        Contender("raw", lambda: collate([theirs[0]])),
    ]
    table = "Training with ResNet-18 on this processor, no loader process: data wait"
    compare(table, "+".join(modalities), contenders, threads=1, error=error, shares=shares)


class ResNet18(nn.Module):
    """Features `[B, T, 512]` of frames `[B, T, 3, h, w]`."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.network = resnet18()
        self.network.fc = nn.Identity()

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.network(frames.flatten(0, 1))
        return features.unflatten(0, frames.shape[:2])


def _rates(ours: list[float], raw: list[float]) -> dict[str, str]:
    times = timing.ratio(raw, ours)
    return {
        "converted, samples/s": f"{1 / median(ours):.1f}",
        "raw, samples/s": f"{1 / median(raw):.2f}",
        "times as fast": f"{times.of_medians:.1f} ({times.low:.1f}-{times.high:.1f})",
    }


def _clips(root: Path) -> list[Clip]:
    return Ntu60Options(modalities=MODALITIES).listing(root).clips


def _training(root: Path, modalities: tuple[str, ...]) -> ClipSplit:
    split = Ntu60Options(modalities=modalities).load(root, 0).train  # type: ignore[arg-type]
    assert isinstance(split, ClipSplit)
    assert len(split) == 1
    return split


@functools.cache
def _check_frames(raw: Path, converted: Path, modality: str) -> float:
    """The largest relative error of a converted frame; AssertionError where it passes TOLERANCE or
    another frame is as near."""
    ours, theirs = (_clips(root)[0].sources[modality] for root in (converted, raw))
    assert ours.count() == theirs.count() == FRAMES
    indices = Sampling()(FRAMES)
    found, expected = (source.read(indices, 256).double() for source in (ours, theirs))
    assert found.shape == expected.shape
    error = torch.cdist(found.flatten(1), expected.flatten(1)) / expected.flatten(1).norm(dim=1)
    right = error.diagonal()
    assert (right <= TOLERANCE[modality]).all(), f"relative errors are {right}: no timing"
    assert (error.argmin(1) == torch.arange(len(indices))).all(), "frames are mixed up: no timing"
    return float(right.max())


def _scene(number: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 `[h, w, 3]`: a still background and a block that moves, under noise of the sensor."""
    image = _texture(size).copy()
    side = size[0] // 3
    left = number * (size[1] - side) // FRAMES
    image[side : 2 * side, left : left + side] = image[:side, :side]
    noise = np.random.default_rng(0).integers(0, 8, (size[0], size[1], 1), dtype=np.uint8)
    return image + np.roll(noise, (37 * number, 91 * number), (0, 1))


@functools.cache
def _texture(size: tuple[int, int]) -> np.ndarray:
    """uint8 `[h, w, 3]` of detail as in photographs: as much contrast in each octave."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 3, *size), 120.0)
    for cell in (4, 8, 16, 32, 64, 128, 256):
        height, width = size[0] // cell + 2, size[1] // cell + 2
        grey = torch.randn(1, 1, height, width, generator=generator)
        tint = torch.randn(1, 3, height, width, generator=generator)
        detail = 10 * grey + 3 * tint
        image += nn.functional.interpolate(detail, size, mode="bilinear", align_corners=False)
    return image[0].permute(1, 2, 0).clamp(0, 247).byte().numpy()


def _write_video(path: Path, size: tuple[int, int], bit_rate: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.height, stream.width = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", bit_rate
        stream.options = {"bf": "2"}
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(_scene(number, size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_depth(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    body = 2000 + random.integers(0, 40, (300, 90)).cumsum(1)
    for number in range(FRAMES):
        image = np.zeros(KINECT_SIZE, np.uint16)
        image[80:380, 3 * number : 3 * number + 90] = body + number
        Image.fromarray(image).save(folder / f"MDepth-{number + 1:08d}.png")
