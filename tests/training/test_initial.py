"""Trainings that begin with another run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data import miniature
from networks import TinyResNet, shrink_resnets
from outcomes import outcome, unequal

from mmixer_kernels import train
from mmixer_kernels.training import checkpoint, loop


def arrays(root: Path, classes: tuple[str, ...], sizes: dict[str, int], samples: int = 24) -> Path:
    root.mkdir()
    random = np.random.default_rng(len(classes))
    for part in ("train", "validation", "test"):
        label = np.arange(samples) % len(classes)
        features = {
            name: random.standard_normal((samples, 4, size)) + label[:, None, None]
            for name, size in sizes.items()
        }
        np.savez(root / f"{part}.npz", label=label, classes=np.array(classes), **features)
    return root


SIZES = {"a": 3, "b": 2}
NEW = ("mixer.classifier.weight", "mixer.classifier.bias")


def run(root: Path, output: Path, *more: object) -> int:
    given = ["--data", "arrays", "--root", root, "--output", output, "--epochs", 1, *more]
    tiny = ["--model.hidden-size", 8, "--device", "cpu"]
    return train.main([str(argument) for argument in (*tiny, *given)])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run with three classes."""
    folder = tmp_path_factory.mktemp("first")
    root = arrays(folder / "root", ("sit", "stand", "fall"), SIZES)
    assert run(root, folder / "run", "--optimizer.learning-rate", 0.1) == 0
    return folder / "run" / "last.pt"


@pytest.fixture
def at_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights that a training begins with, once one has begun."""
    begun: dict[str, torch.Tensor] = {}
    inner = loop.Trainer.fit

    def fit(self: loop.Trainer, *arguments: object) -> None:
        begun.update({name: x.clone() for name, x in self.model.state_dict().items()})
        inner(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Trainer, "fit", fit)
    return begun


def test_the_same_classes_keep_every_tensor(
    first: Path,
    tmp_path: Path,
    at_start: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = first.parents[1] / "root"
    assert run(root, tmp_path / "run", "--init-from", first, "--seed", 5) == 0
    expected = checkpoint.load(first)["model"]
    assert unequal(at_start, dict(expected)) == []
    error = capsys.readouterr().err
    assert f"initial weights of {first}, epoch 1: {len(expected)} tensors\n" in error
    assert "start anew" not in error
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (state["epoch"], len(state["history"])) == (1, 1)
    assert state["optimizer"]["state"][0]["step"] == 3  # of 24 samples in batches of 8


@pytest.mark.parametrize("classes", [("sit", "fall", "stand"), ("sit", "stand"), tuple("01234")])
def test_other_classes_start_the_classifier_anew_and_name_it(
    first: Path,
    tmp_path: Path,
    at_start: dict[str, torch.Tensor],
    classes: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = arrays(tmp_path / "root", classes, SIZES)
    assert run(root, tmp_path / "run", "--init-from", first) == 0
    error, begun = capsys.readouterr().err, dict(at_start)
    assert (
        f"{' and '.join(NEW)} start anew: the classes of {first} were 3 (sit, stand, fall), here "
        f"they are {len(classes)} ({', '.join(classes)})\n"
    ) in error
    expected = checkpoint.load(first)["model"]
    assert run(root, tmp_path / "random") == 0
    for name, value in begun.items():
        source = at_start if name in NEW else expected
        assert torch.equal(value, source[name]), name
    assert any(not torch.equal(at_start[name], begun[name]) for name in begun)


def test_it_repeats_and_resumes_without_the_file(first: Path, tmp_path: Path) -> None:
    root = arrays(tmp_path / "root", ("a", "b"), SIZES)
    source = shutil.copy(first, tmp_path / "source.pt")
    whole, again, short = (tmp_path / name for name in ("whole", "again", "short"))
    assert run(root, whole, "--init-from", source, "--epochs", 2) == 0
    assert train.main(["--config", str(whole / "config.toml"), "--output", str(again)]) == 0
    assert unequal(outcome(again), outcome(whole)) == []
    assert json.loads((whole / "result.json").read_text())["config"]["init_from"] == str(source)
    assert run(root, short, "--init-from", source) == 0
    source.unlink()
    assert train.main(["--output", str(short), "--resume", "--epochs", "2"]) == 0
    assert unequal(outcome(short), outcome(whole)) == []


def test_a_run_without_it_is_another_one(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(first.parent, tmp_path / "copy")
    given = ["--output", str(copy), "--resume", "--init-from", str(first)]
    assert train.main(given) == 2
    assert f"--init-from was None, is {first}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        (SIZES, ["--model.hidden-size", 9], "--model.hidden-size was 8, is 9"),
        (SIZES, ["--model.unit", "gru"], "--model.unit was mcu, is gru"),
        (SIZES, ["--model.summarizer", "max"], "--model.summarizer was avg, is max"),
        (SIZES, ["--model.content", "self"], "--model.content was cross, is self"),
        ({"a": 3, "b": 4}, [], "b was features of size 2, is features of size 4"),
        ({"b": 2, "a": 3}, [], "its modalities were a, b, are b, a"),
        ({"a": 3, "b": 2, "c": 2}, [], "its modalities were a, b, are a, b, c"),
    ],
)
def test_another_network_is_refused_with_both_values(
    first: Path,
    tmp_path: Path,
    sizes: dict[str, int],
    more: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = arrays(tmp_path / "root", ("sit", "stand", "fall"), sizes)
    assert run(root, tmp_path / "run", "--init-from", first, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --init-from {first} is of another network: {message}"
    assert not (tmp_path / "run").exists()


def test_other_extractors_are_refused_with_their_tensors(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.load(tiny_run / "best.pt")["data"]
    sizes = dict(zip(saved["modalities"], saved["feature_sizes"], strict=True))
    root = arrays(tmp_path / "root", ("sit", "stand"), sizes)
    assert run(root, tmp_path / "run", "--init-from", tiny_run / "best.pt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is of another network: extractors.0.layers.0.weight was [16, " in error
    assert ", is absent, " in error


@pytest.mark.slow
def test_frames_extractors_come_from_the_checkpoint_not_from_their_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink_resnets(monkeypatch)
    miniature.ntu(tmp_path / "ntu")
    given = [
        *("--data", "ntu60", "--root", str(tmp_path / "ntu"), "--image-size", "32"),
        *("--epochs", "1", "--model.hidden-size", "8", "--device", "cpu", "--output"),
    ]
    output, weights = tmp_path / "run", "--model.weights"
    assert train.main([*given, str(output), weights, "none"]) == 0
    more = [weights, "missing.pth", "--optimizer.learning-rate", "1e-30"]
    source = output / "best.pt"
    again = tmp_path / "again"
    assert train.main([*given, str(again), *more, "--init-from", str(source)]) == 0
    ours, theirs = (checkpoint.load(path)["model"] for path in (again / "best.pt", source))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) or ".bn1." in name, name
    capsys.readouterr()
    other = [*given, str(tmp_path / "other"), weights, "none", "--model.extractor", "resnet34"]
    monkeypatch.setattr(TinyResNet, "kernel", 3)
    assert train.main([*other, "--init-from", str(source)]) == 2
    error = capsys.readouterr().err
    assert "--model.extractor was auto, is resnet34; extractors.0.network.conv1" in error


def test_what_is_not_the_same_but_fits_is_noted(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = arrays(tmp_path / "root", ("sit", "stand", "fall"), {"a": 3, "c": 2})
    assert run(root, tmp_path / "run", "--init-from", first, "--no-standardize") == 0
    error = capsys.readouterr().err
    assert "note: c starts from the weights of b\n" in error
    assert f"note: --standardize was True in {first}, here it is False" in error


def test_files_that_are_no_networks_are_named(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    root = first.parents[1] / "root"
    for path, message in (
        (tmp_path / "missing.pt", "missing.pt is not a file"),
        (broken, "broken.pt is damaged"),
    ):
        assert run(root, tmp_path / "run", "--init-from", path) == 2
        assert message in capsys.readouterr().err
