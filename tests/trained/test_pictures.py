from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mmixer_kernels.data import Data, Split
from mmixer_kernels.data.transforms import normalized
from mmixer_kernels.trained import pictures
from mmixer_kernels.trained.predictions import Prediction

CLASSES = ("sit", "stand", "fall")


def data(frames: bool) -> Data:
    split = Split(torch.zeros(0, dtype=torch.int64))
    own = (None, None) if frames else ([torch.nn.Identity()] * 2, (3, 3))
    return Data(("a", "b"), CLASSES, split, split, split, *own)


def prediction(shape: tuple[int, ...], label: int | None) -> Prediction:
    logits = {
        "a": torch.tensor([0.1, 0.7, 0.2]).log(),
        "a+b": torch.tensor([0.6, 0.1, 0.3]).log(),
    }
    return Prediction("clip", label, {"a": torch.rand(shape), "b": torch.rand(shape)}, logits)


def test_normalisation_is_undone_and_frames_stand_in_order() -> None:
    frames = (torch.rand(9, 3, 4, 5) * 255).byte()
    strip = pictures.strip(normalized(frames), normalized=True)
    chosen = [0, 2, 3, 5, 6, 8]
    expected = torch.cat([frames[i].permute(1, 2, 0) for i in chosen], dim=1)
    torch.testing.assert_close(strip, expected / 255, atol=1e-5, rtol=0)
    grey = torch.rand(2, 1, 4, 5)
    assert torch.equal(pictures.strip(grey, normalized=False), torch.cat([grey[0], grey[1]], -1)[0])


@pytest.mark.parametrize(
    ("label", "colours"),
    [
        (1, ["tab:green", "0.45", "tab:red", "0.45"]),
        (2, ["tab:red", "tab:green", "tab:red", "tab:green"]),
        (None, ["black", "0.45", "black", "0.45"]),
    ],
)
def test_right_classes_are_green_and_wrong_ones_red(label: int | None, colours: list[str]) -> None:
    figure = pictures.figure([prediction((4, 3, 8, 8), label)], data(True), top=2)
    texts = [text for axis in figure.axes for text in axis.texts]
    assert [text.get_text() for text in texts] == [
        *("stand (70.00)", "fall (20.00)", "sit (60.00)", "fall (30.00)"),
    ]
    assert [text.get_color() for text in texts] == colours


@pytest.mark.parametrize(("shape", "curves"), [((20, 3), 3), ((20, 40), 0)])
def test_signals_are_curves_and_features_an_image(shape: tuple[int, ...], curves: int) -> None:
    figure = pictures.figure([prediction(shape, 0)], data(False), top=1)
    assert [len(axis.lines) for axis in figure.axes[:2]] == [curves] * 2
    assert [len(axis.images) for axis in figure.axes[:2]] == [curves == 0] * 2


def test_samples_are_written_as_one_png(tmp_path: Path) -> None:
    samples = [prediction((4, 3, 8, 8), 0), prediction((1, 3, 8, 8), None)]
    pictures.write(tmp_path / "p.png", samples, data(True), top=3)
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert "matplotlib.pyplot" not in sys.modules
