"""Features of a run's data set, and the training on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from networks import TinyResNet, shrink_resnets

from mmixer_kernels import extract, train
from mmixer_kernels.data import DATA, ArraysOptions, Data, Sample, Split
from mmixer_kernels.trained.restore import restore
from mmixer_kernels.training import checkpoint

MODALITIES = ("rgb", "depth")


class FrameSplit(Split):
    """Clips of 1 to 3 frames; augmented ones are brighter."""

    def __init__(self, samples: int, augmented: bool) -> None:
        super().__init__(torch.arange(samples) % 3)
        self.augmented = augmented

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        length = index % 3 + 1
        clips = [torch.randn(length, 3, 40, 40, generator=generator) for _ in MODALITIES]
        return Sample(
            tuple(clip + 10 * self.augmented for clip in clips), int(self.labels[index]), length
        )

    def plain(self) -> Split:
        return FrameSplit(len(self), False)


@dataclass(frozen=True)
class FrameOptions:
    recipe: ClassVar[dict[str, object]] = {"loader.batch_size": 4}

    def load(self, root: Path | None, seed: int) -> Data:
        return Data(
            modalities=MODALITIES,
            classes=("sit", "stand", "fall", "never seen"),
            train=FrameSplit(9, True),
            validation=FrameSplit(6, False),
            test=FrameSplit(5, False),
            extractors=None,
            feature_sizes=None,
        )


@pytest.fixture(autouse=True)
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA, "frames", FrameOptions)
    shrink_resnets(monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(TinyResNet().state_dict(), path)
    return path


def command(*arguments: object) -> int:
    return extract.main([str(argument) for argument in arguments])


def expected(network: torch.nn.Module, split: Split, modality: int) -> list[np.ndarray]:
    network.eval()
    with torch.no_grad():
        return [network(split[i].inputs[modality]).numpy() for i in range(len(split))]


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


def test_pretrained_features_are_the_networks_and_train(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "features"
    arguments = ["--data", "frames", "--model.weights", weights, "--loader.workers", 1]
    assert command(*arguments, "--output", output) == 0
    assert f"{output / 'train.npz'}: 9 samples, up to 3 steps" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [
        *("test.npz", "train.npz", "validation.npz"),
    ]
    assert [path.name for path in output.parent.iterdir()] == ["features"]
    network = TinyResNet()
    network.load_state_dict(torch.load(weights))
    network.fc = torch.nn.Identity()
    data = ArraysOptions(standardize=False).load(output, 0)
    assert data.modalities == MODALITIES
    assert data.classes == ("sit", "stand", "fall", "never seen")
    for split, count in ((data.train, 9), (data.validation, 6), (data.test, 5)):
        assert len(split) == count
        clips = FrameSplit(count, False)
        for modality in range(2):
            for sample, features in enumerate(expected(network, clips, modality)):
                found = split[sample].inputs[modality]
                assert distance(found, features) < 1e-4
                assert split[sample].length == len(features) == sample % 3 + 1
                assert split[sample].label == clips[sample].label
    trained = ["--data", "arrays", "--root", output, "--output", tmp_path / "run", "--epochs", 2]
    assert train.main([*map(str, trained), "--model.hidden-size", "8"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 5


def test_a_checkpoint_gives_its_own_trained_features(weights: Path, tmp_path: Path) -> None:
    arguments = ["--data", "frames", "--model.weights", weights, "--output", tmp_path / "run"]
    small = ["--model.hidden-size", 8, "--epochs", 1, "--optimizer.learning-rate", 0.01]
    assert train.main([str(argument) for argument in (*arguments, *small)]) == 0
    weights_now = checkpoint.load(tmp_path / "run" / "best.pt")["model"]
    assert command(tmp_path / "run" / "best.pt", "--batch-size", 2) == 0
    network = restore(tmp_path / "run" / "best.pt").model.extractors[1].network  # type: ignore[union-attr]
    key = "conv1.weight"
    assert torch.equal(network.state_dict()[key], weights_now[f"extractors.1.network.{key}"])
    assert not torch.equal(network.state_dict()[key], torch.load(weights)[key])
    data = ArraysOptions(standardize=False).load(tmp_path / "run" / "features", 0)
    for sample, features in enumerate(expected(network, FrameSplit(9, False), 1)):
        assert distance(data.train[sample].inputs[1], features) < 1e-4


def test_extractors_that_shorten_time_give_their_own_steps(tmp_path: Path) -> None:
    tiny = ["--epochs", "1", "--samples", "32", "--model.hidden-size", "8"]
    assert train.main(["--data", "watch", *tiny, "--output", str(tmp_path)]) == 0
    assert command(tmp_path / "best.pt", "--output", tmp_path / "features") == 0
    data = ArraysOptions().load(tmp_path / "features", 0)
    assert data.train[0].inputs[0].shape == (13, 64)
    assert data.modalities == ("accelerometer", "gyroscope")
    assert len(data.train) > 32  # every window of the training recordings, not an epoch's draws


def test_mistakes_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.npz", "test.npz"):
        arrays = {"a": np.ones((4, 2, 3)), "b": np.ones((4, 2, 3)), "label": np.arange(4) % 2}
        np.savez(tmp_path / name, **arrays)
    arguments = ["--data", "arrays", "--root", ".", "--epochs", "1", "--output", "run"]
    assert train.main([*arguments, "--model.hidden-size", "4"]) == 0
    capsys.readouterr()
    for given, message in (
        (["--data", "imagenet"], "--data must be one of"),
        (["--data", "watch", "--output", "x"], "no networks of frames"),
        (["--data", "watch", "--model.weights", "none"], "--model.weights must be left out"),
        (["--data", "frames", "--model.weights", "missing.pth"], "missing.pth is not a file"),
        (["--data", "frames", "--output", "run"], "--output run must be a new or empty folder"),
        (["run/best.pt"], "features already: there is nothing to extract"),
        (["missing.pt"], "missing.pt is not a file"),
    ):
        assert command(*given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert message in error


def test_a_failure_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmixer_kernels.errors import DamagedFile

    def damaged(self: FrameSplit, index: int) -> Sample:
        if len(self) == 5 and index == 3:
            raise DamagedFile(tmp_path / "clip.avi", "frame 7 is damaged")
        return original(self, index)

    original = FrameSplit.__getitem__
    monkeypatch.setattr(FrameSplit, "__getitem__", damaged)
    arguments = ["--data", "frames", "--model.weights", "none", "--output", tmp_path / "features"]
    assert command(*arguments) == 2
    assert not (tmp_path / "features").exists()
    monkeypatch.setattr(FrameSplit, "__getitem__", original)
    assert command(*arguments) == 0
    assert len(list((tmp_path / "features").iterdir())) == 3
