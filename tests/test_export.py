"""Exported networks, loaded again and run by themselves."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmixer_kernels import evaluate, export, onnx, predict, train
from mmixer_kernels.data import SyntheticOptions
from mmixer_kernels.problem import Problem
from mmixer_kernels.trained.restore import restore

SHAPES = {"rgb": (3, 8, 8), "depth": (1, 8, 8)}
TINY = [
    *("--frame-size", "8", "--frames", "3", "--samples", "32", "--evaluation-samples", "32"),
    *("--epochs", "1", "--model.hidden-size", "8"),
]


def command(*arguments: object) -> int:
    return export.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tiny_run: Path) -> Path:
    return tiny_run / "best.pt"


def batch(count: int, steps: int) -> list[Tensor]:
    return [torch.randn(count, steps, *shape) for shape in SHAPES.values()]


def run_onnx(path: Path, inputs: list[Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {name: x.numpy() for name, x in zip(SHAPES, inputs, strict=True)}
    return torch.from_numpy(session.run(None, named)[0])


def run_torch(path: Path, inputs: list[Tensor]) -> Tensor:
    return torch.export.load(path).module()(*inputs)


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported")
    for name in ("m.onnx", "m.pt2"):
        assert command(finished, "--output", output / name) == 0
    return output


@pytest.mark.parametrize(("name", "loaded"), [("m.onnx", run_onnx), ("m.pt2", run_torch)])
def test_any_batch_and_time_give_the_networks_logits(
    finished: Path, exported: Path, name: str, loaded: Any
) -> None:
    network = restore(finished).model
    for count, steps in ((1, 1), (4, 7), (2, 3)):
        inputs = batch(count, steps)
        with torch.no_grad():
            torch.testing.assert_close(loaded(exported / name, inputs), network(inputs))


def test_the_file_names_modalities_and_classes(exported: Path) -> None:
    import onnxruntime

    classes = SyntheticOptions().load(None, 0).classes
    session = onnxruntime.InferenceSession(str(exported / "m.onnx"))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(classes)
    assert json.loads(about["modalities"]) == list(SHAPES)
    assert {x.name: x.shape for x in session.get_inputs()} == {
        name: ["batch", "time", *shape] for name, shape in SHAPES.items()
    }
    assert session.get_outputs()[0].shape == ["batch", len(classes)]
    files = {"about.json": ""}
    torch.export.load(exported / "m.pt2", extra_files=files)
    assert json.loads(files["about.json"]) == {key: json.loads(text) for key, text in about.items()}


@pytest.mark.slow
def test_every_command_takes_a_network_without_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.content", "none", "--model.init", "orthogonal", "--device", "cpu"]
    assert train.main([*TINY, *arguments, "--output", str(tmp_path)]) == 0
    path = str(tmp_path / "best.pt")
    assert evaluate.main([path, "--streams", "--missing"]) == 0
    assert predict.main([path, "--index", "0", "--output", str(tmp_path / "predictions.png")]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} stream alone" in printed for name in SHAPES)
    network, inputs = restore(Path(path)).model, batch(3, 5)
    for name, loaded in (("m.onnx", run_onnx), ("m.pt2", run_torch)):
        assert command(path, "--output", tmp_path / name) == 0
        with torch.no_grad():
            torch.testing.assert_close(loaded(tmp_path / name, inputs), network(inputs))


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_recurrent_units_of_pytorch_need_a_number_of_steps(
    unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*TINY, "--model.unit", unit, "--output", str(tmp_path)]) == 0
    path = tmp_path / "m.onnx"
    assert command(tmp_path / "best.pt", "--output", path) == 2
    assert "fix the number of steps by --steps" in capsys.readouterr().err
    assert command(tmp_path / "best.pt", "--output", path, "--steps", 5) == 0
    assert "rgb [batch, 5, 3, 8, 8]" in capsys.readouterr().out
    inputs = batch(3, 5)
    with torch.no_grad():
        expected = restore(tmp_path / "best.pt").model(inputs)
    torch.testing.assert_close(run_onnx(path, inputs), expected)


def test_a_wrong_export_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def other_order(problem: Problem) -> Any:
        return loop(problem._replace(contexts=problem.contexts[::-1]))

    loop = onnx.in_a_scan
    monkeypatch.setattr(onnx, "in_a_scan", other_order)
    assert command(finished, "--output", tmp_path / "m.onnx") == 2
    assert "the exported network differs by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_in_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    for arguments, message in (
        ([finished, "--output", "m.onnx"], "needs onnxruntime, which cannot be found: pip install"),
        ([finished, "--output", "m.tflite"], "--output must end in .onnx or .pt2, but is m.tflite"),
        ([finished, "--output", "m.pt2", "--steps", 0], "--steps must be 1 or more, but is 0"),
        ([finished, "--output", tmp_path / "no" / "m.pt2"], "No such file"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert message in error


@pytest.mark.parametrize(("name", "loaded"), [("m.onnx", run_onnx), ("m.pt2", run_torch)])
def test_features_are_standardized_in_the_file(tmp_path: Path, name: str, loaded: Any) -> None:
    """It takes features as new files have them, whatever their scale, and agrees with predict."""
    random = np.random.default_rng(0)
    scales = {"rgb": (200.0, 30.0), "depth": (9.8, 0.01)}
    files = {
        name: {
            key: mean + scale * random.normal(size=(16, 4, 3))
            for key, (mean, scale) in scales.items()
        }
        | {"label": np.arange(16) % 3}
        for name in ("train", "test")
    }
    for split, arrays in files.items():
        np.savez(tmp_path / f"{split}.npz", **arrays)
    run = ["--data", "arrays", "--root", str(tmp_path), "--output", str(tmp_path / "run")]
    small = ["--epochs", "1", "--model.hidden-size", "8", "--device", "cpu"]
    assert train.main([*run, *small]) == 0
    checkpoint, scores = tmp_path / "run" / "best.pt", tmp_path / "scores.csv"
    picture = ["--output", str(tmp_path / "predictions.png")]
    assert predict.main([str(checkpoint), "--scores", str(scores), *picture]) == 0
    assert command(checkpoint, "--output", tmp_path / name) == 0
    inputs = [torch.from_numpy(files["test"][key]).float() for key in scales]
    found = loaded(tmp_path / name, inputs).softmax(1)
    with scores.open() as file:
        rows = [row for row in csv.DictReader(file) if row["stream"] == "rgb+depth"]
    expected = torch.tensor([[float(row[key]) for key in ("0", "1", "2")] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
