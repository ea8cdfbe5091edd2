"""A video network under M-Mixer, on NTU in miniature: trained or frozen, its features, and M-Mixer
on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data import miniature

from mmixer_kernels import evaluate, export, extract, predict, train
from mmixer_kernels.data import ArraysOptions
from mmixer_kernels.trained.restore import restore
from mmixer_kernels.training import checkpoint, loop, model, parsing

pytest.importorskip("av")
torchvision = pytest.importorskip("torchvision")

NAME = "s3d"
"""The smallest one."""
FRAMES = ["--data", "ntu60", "--device", "cpu", "--frames", "16", "--image-size", "32"]
RANDOM = ["--model.extractor", NAME, "--model.weights", "none", "--model.hidden-size", "8"]
SMALL = ["--model.hidden-size", "8", "--epochs", "2", "--loader.batch-size", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ntu")
    miniature.ntu(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    torch.save(torchvision.models.get_model(NAME).state_dict(), path)
    return path


def result(folder: Path) -> dict[str, object]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e-5", "0"])
def test_it_trains_is_extracted_and_its_features_train(
    root: Path, weights: Path, tmp_path: Path, rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--model.extractor", NAME, "--model.weights", str(weights)]
    given = [*FRAMES, "--root", str(root), *network]
    run = tmp_path / "run"
    more = ["--optimizer.extractor-rate", rate, "--output", str(run)]
    assert train.main([*given, *SMALL, *more, "--model.gradient-checkpointing"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    trained, first = checkpoint.load(run / "best.pt")["model"], torch.load(weights)
    for key in ("features.0.0.0.weight", "features.0.0.1.running_mean"):
        same = torch.equal(trained[f"extractors.1.network.{key}"], first[key])
        assert same == (rate == "0"), key
    assert evaluate.main([str(run / "best.pt")]) == 0
    files = root.rglob("S001C001P003R001A001*")
    capsys.readouterr()
    assert predict.main([str(run / "best.pt"), *map(str, files)]) == 0
    assert "rgb+depth" in capsys.readouterr().out

    assert extract.main([str(run / "best.pt")]) == 0
    data = ArraysOptions(standardize=False).load(run / "features", 0)
    restored = restore(run / "best.pt")
    for ours, theirs in zip(data.test, restored.data.test, strict=True):
        with torch.no_grad():
            features = restored.model.features([x[None] for x in theirs.inputs])
        for x, y in zip(ours.inputs, features, strict=True):
            assert x.shape == (2, 1024)
            torch.testing.assert_close(x, y[0])
    if rate == "0":
        pretrained = tmp_path / "features"
        assert extract.main([*given, "--loader.batch-size", "2", "--output", str(pretrained)]) == 0
        same = ArraysOptions(standardize=False).load(pretrained, 0)
        for ours, theirs in zip(data.train, same.train, strict=True):
            assert all(map(torch.equal, ours.inputs, theirs.inputs))

    features = ["--data", "arrays", "--root", str(run / "features"), *SMALL]
    assert train.main([*features, "--device", "cpu", "--output", str(tmp_path / "head")]) == 0
    assert result(tmp_path / "head")["samples"] == result(run)["samples"] == 2


@pytest.fixture(scope="module")
def untrained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network that was not trained, of clips of 16 frames."""
    chosen = parsing.parse([*FRAMES, "--root", str(root), *RANDOM], "train")
    data = chosen.load_data()
    network = model.build(chosen.run.model, data).state_dict()
    state = {"config": chosen.config(), "data": loop.identity(data), "model": network, "epoch": 1}
    path = tmp_path_factory.mktemp("untrained") / "best.pt"
    checkpoint.save(state, path)
    return path


def test_weights_of_another_run_do_not_hide_what_it_cannot_take(
    root: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*FRAMES, "--root", str(root), *RANDOM, "--frames", "4"]
    run = tmp_path / "run"
    assert train.main([*given, "--init-from", str(untrained), "--output", str(run)]) == 2
    assert "s3d cannot take clips of 4 frames of 32" in capsys.readouterr().err
    assert not run.exists()


def test_it_cannot_be_exported_with_steps_that_it_cannot_take(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "network.pt2"
    assert export.main([str(untrained), "--output", str(path), "--steps", "4"]) == 2
    assert "such as 16, that of the run, but is 4" in capsys.readouterr().err
    assert not path.exists()


def test_what_it_cannot_do_is_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", "ntu60", "--device", "cpu", "--root", str(root), "--model.weights", "none"]
    for more, message in (
        (["--model.extractor", "s3d"], "s3d joins the frames of a clip"),
        (["--model.extractor", "s3d", "--frames", "4"], "s3d cannot take clips of 4 frames of 224"),
        (["--model.extractor", "resnet_18"], "perhaps resnet18"),
    ):
        for command in (train, extract):
            assert command.main([*given, *more, "--output", str(tmp_path / "run")]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert message in error
    assert not (tmp_path / "run").exists()
