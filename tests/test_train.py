from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmixer_kernels import evaluate as evaluate_command
from mmixer_kernels import train
from mmixer_kernels.trained.evaluation import evaluate
from mmixer_kernels.training import checkpoint, loop, parsing

TINY = [
    *("--frames", "4", "--frame-size", "8", "--samples", "16", "--evaluation-samples", "16"),
    *("--model.hidden-size", "8", "--model.engine", "reference", "--loader.batch-size", "4"),
    *("--epochs", "2", "--optimizer.learning-rate", "0.01", "--optimizer.schedule", "constant"),
    *("--device", "cpu"),
]
PNGS = ("learning_curves.png", "confusion.png", "class_accuracy.png")


def run(*arguments: object) -> int:
    return train.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "deep" / "run"
    assert run(*TINY, "--output", output) == 0
    return output


def test_a_run_writes_what_design_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("config.toml", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "result.json"),
        *PNGS,
    }
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert set(records[0]) == {
        *("epoch", "loss", "accuracy", "learning_rate", "seconds", "data_wait"),
        *("samples_per_second", "validation_loss", "validation_accuracy"),
        "validation_mean_class_accuracy",
    }
    result = json.loads((finished / "result.json").read_text())
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == result["samples"] == 16
    assert result["accuracy"] == confusion.diagonal().sum().item() / 16
    assert len(result["per_class_accuracy"]) == len(result["classes"]) == 16
    assert result["validation"]["accuracy"] == max(r["validation_accuracy"] for r in records)
    assert result["epoch"] == checkpoint.load(finished / "best.pt")["epoch"]
    assert result["checkpoint"] == "best.pt"
    assert (result["seed"], result["engine"], result["device"]) == (0, "reference", "cpu")
    assert set(result["versions"]) == {"mmixer_kernels", "python", "torch", "numpy", "platform"}
    assert (result["processes"], result["effective_batch_size"]) == (1, 4)
    assert result["learning_rate"] == 0.01
    assert result["config"]["model"]["hidden_size"] == 8


def test_the_first_line_names_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, more, auto in (("a", ["--device", "cpu"], ""), ("b", ["--device", "auto"], "auto")):
        if auto and torch.cuda.is_available():
            continue
        assert run(*TINY, *more, "--epochs", 1, "--output", tmp_path / output) == 0
        first = capsys.readouterr().err.splitlines()[0]
        assert first.startswith(f"device cpu ({auto + ', ' if auto else ''}1 thread")
        assert first.endswith("), engine reference, float32")
    evaluation = [str(tmp_path / "a" / "best.pt")]
    assert evaluate_command.main(evaluation) == 0
    assert capsys.readouterr().err.startswith("device cpu (1 thread")


def test_standardized_features_of_different_scales_are_learnt_from_few_samples(
    tmp_path: Path,
) -> None:
    """36 training samples whose features have deviations from 0.001 to 1000: only the largest of
    them are seen as they come."""
    kinds = np.random.default_rng(9).standard_normal((3, 2, 6))
    scales = {"a": 10.0 ** np.arange(-3, 3), "b": 10.0 ** np.arange(3, -3, -1)}
    for seed, (part, samples) in enumerate((("train", 36), ("validation", 30), ("test", 120))):
        random, label = np.random.default_rng(seed), np.arange(samples) % 3
        features = {
            name: scale * (10 + kinds[label, i, None] + 2 * random.standard_normal((samples, 8, 6)))
            for i, (name, scale) in enumerate(scales.items())
        }
        np.savez(tmp_path / f"{part}.npz", label=label, **features)
    arguments = ["--data", "arrays", "--root", tmp_path, "--epochs", 15, "--device", "cpu"]
    arguments += ["--model.hidden-size", 16, "--optimizer.learning-rate", 5e-3]
    found = []
    for form in ("--standardize", "--no-standardize"):
        assert run(*arguments, form, "--output", tmp_path / form) == 0
        result = json.loads((tmp_path / form / "result.json").read_text())
        found.append(result["accuracy"])
    assert found[0] > 0.85
    assert found[0] > found[1] + 0.2


def test_the_test_set_is_not_touched_before_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmixer_kernels.data import SyntheticOptions

    inner = SyntheticOptions.load

    def load(self: SyntheticOptions, root: Path | None, seed: int) -> Any:
        data = inner(self, root, seed)

        class Watched(type(data.test)):  # type: ignore[misc]
            def __getitem__(self, index: int) -> Any:
                assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
                touched.append(index)
                return super().__getitem__(index)

        data.test.__class__ = Watched
        return data

    touched: list[int] = []
    monkeypatch.setattr(SyntheticOptions, "load", load)
    assert run(*TINY, "--output", tmp_path) == 0
    assert touched == list(range(16))


def test_the_config_of_a_run_repeats_it(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert run("--config", finished / "config.toml", "--output", again) == 0
    for name in ("config.toml", "result.json"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    ours, theirs = (checkpoint.load(folder / "best.pt")["model"] for folder in (again, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_last_epoch_can_be_the_one_that_is_tested(tmp_path: Path) -> None:
    # At this rate the first of the two epochs is the best.
    arguments = [*TINY, "--optimizer.learning-rate", "30", "--output", tmp_path]
    assert run(*arguments, "--select", "last") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    last, best = (checkpoint.load(tmp_path / name) for name in ("last.pt", "best.pt"))
    assert (result["checkpoint"], result["epoch"]) == ("last.pt", 2)
    assert best["epoch"] == 1
    assert result["validation"]["loss"] == last["history"][1]["validation_loss"]
    report = evaluate(tmp_path / "last.pt", "test")
    assert (report["loss"], report["confusion"]) == (result["loss"], result["confusion"])
    assert report["loss"] != evaluate(tmp_path / "best.pt", "test")["loss"]


def test_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "result.json").read_bytes()
    assert run(*TINY, "--seed", 1, "--output", finished) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {finished} holds a finished run")
    assert "--resume" in error
    assert (finished / "result.json").read_bytes() == before


def test_the_default_output_is_named_by_data_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, "--epochs", 1, "--seed", 5) == 0
    assert (tmp_path / "runs" / "synthetic-5" / "result.json").is_file()


def test_resume_needs_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--output", tmp_path, "--resume") == 2
    assert f"--resume found no checkpoint {tmp_path / 'last.pt'}" in capsys.readouterr().err


def test_resume_refuses_other_options(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    for changed, message in (
        (["--model.hidden-size", "9"], "--model.hidden-size was 8, is 9"),
        (["--epochs", "1"], "--epochs was 2, is 1"),
        (["--epochs", "3", "--optimizer.schedule", "cosine"], "--epochs was 2, is 3"),
    ):
        assert run("--output", copy, "--resume", *changed) == 2
        assert message in capsys.readouterr().err
    assert run("--output", copy, "--resume", "--loader.workers", 1) == 0


def test_resume_takes_a_run_of_a_version_with_fewer_options(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    state = checkpoint.load(copy / "last.pt")
    del state["config"]["model"]["init"]
    checkpoint.save(state, copy / "last.pt")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('init = "uniform"\n', ""))
    assert run("--output", copy, "--resume", "--model.init", "orthogonal") == 2
    assert "--model.init was uniform, is orthogonal" in capsys.readouterr().err
    assert run("--output", copy, "--resume") == 0
    assert 'init = "uniform"' in config.read_text()


def test_resume_takes_another_device_of_the_same_kind(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    assert run(*TINY, "--output", short, "--epochs", 1) == 0
    capsys.readouterr()
    more = ("--output", short, "--resume", "--epochs", 2)
    assert run(*more, "--device", "cpu:0") == 0
    assert "note:" not in capsys.readouterr().err
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (short, finished))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    for device, resumes in (("cuda:1", False), ("cpu", True)):
        theirs["config"]["device"] = device
        theirs["hardware"] = ["another one"]
        checkpoint.save(theirs, short / "last.pt")
        assert run("--output", short, "--resume", "--device", "cpu") == (0 if resumes else 2)
        error = capsys.readouterr().err
        assert ("--device was cuda, is cpu" in error) == (not resumes)
        assert ("last.pt was written on another one, now it is a CPU with" in error) == resumes


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        chosen = parsing.parse([], "train")
        assert (chosen.run.device, chosen.config()["device"]) == (expected, expected)
        assert parsing.parse_extract(["--data", "ntu60"], "extract").run.device == expected


def test_a_constant_schedule_may_grow(finished: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    assert run(*TINY, "--output", short, "--epochs", 1) == 0
    assert run("--output", short, "--resume", "--epochs", 2) == 0
    assert (short / "result.json").read_bytes() == (finished / "result.json").read_bytes()
    assert (short / "config.toml").read_bytes() == (finished / "config.toml").read_bytes()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--epochs", 1, "--output", tmp_path) == 0
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    assert run("--output", tmp_path, "--resume") == 2
    assert f"{last} is damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_leaves_the_previous_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "last.pt").write_bytes(b"damaged")
    assert run("--output", copy, "--resume") == 0
    assert f"warning: {copy / 'last.pt'} is damaged" in capsys.readouterr().err
    assert (copy / "damaged.pt").read_bytes() == b"damaged"
    assert (copy / "result.json").read_bytes() == (finished / "result.json").read_bytes()
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (copy, finished))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.toml"], "missing.toml"),
        (["--data", "imagenet"], "--data must be one of"),
        (["--root", "somewhere"], "root"),
        (["--samples", "3"], "samples"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--model.engine", "triton"], "triton"),
        (["--epochs", "0"], "--epochs"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    *device, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert all(line.startswith("device cpu (auto, ") for line in device)
    assert len(device) <= 1


def test_a_bug_gives_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(loop.Trainer, "fit", fit)
    with pytest.raises(ValueError, match="a bug"):
        run(*TINY, "--output", tmp_path)


def test_ctrl_c_in_an_epoch_then_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    arguments = [*TINY, "--samples", "64"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*arguments, "--epochs", 3, "--output", whole) == 0
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mmixer_kernels.train", *arguments, "--epochs", "3"),
            *("--output", str(stopped), "--loader.workers", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        start_new_session=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("epoch 1/3") for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1] == (
        f"stopped by SIGINT; go on with: python -m mmixer_kernels.train --output {stopped} --resume"
    )
    assert not (stopped / "result.json").exists()
    assert run("--output", stopped, "--resume", "--loader.workers", 0) == 0
    assert (stopped / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    for name in ("last.pt", "best.pt"):
        ours, theirs = (checkpoint.load(folder / name) for folder in (stopped, whole))
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
