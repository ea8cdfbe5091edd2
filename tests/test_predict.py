"""Predictions of single samples, by streams and together."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import miniature
from networks import shrink_resnets

from mmixer_kernels import evaluate, predict, train
from mmixer_kernels.data import collate
from mmixer_kernels.errors import UserError
from mmixer_kernels.trained import predictions, streams
from mmixer_kernels.trained.restore import restore
from mmixer_kernels.training import checkpoint

VIDEO = [
    *("--data", "ntu60", "--image-size", "32", "--model.weights", "none", "--epochs", "1"),
    *("--model.hidden-size", "8", "--loader.batch-size", "2"),
]


def command(*arguments: object) -> int:
    return predict.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of its own, as `evaluate --streams` writes beside it."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("finished") / "run") / "best.pt"


def table(text: str) -> list[list[tuple[str, str]]]:
    """(confidence, class) by row and stream of a sample's printed table."""
    rows = [line.split() for line in text.splitlines() if line.lstrip()[:1].isdigit()]
    return [
        list(
            zip(
                row[::4], (" ".join(row[i + 1 : i + 4]) for i in range(0, len(row), 4)), strict=True
            )
        )
        for row in rows
    ]


def test_streams_are_shown_when_their_classifiers_are_there(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    arguments = [finished, "--index", 3, "--top", 2, "--output", picture]
    assert command(*arguments) == 0
    text = capsys.readouterr().out
    assert "evaluate" in text
    assert "--streams first" in text
    assert [len(row) for row in table(text)] == [1, 1]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    assert evaluate.main([str(finished), "--streams"]) == 0
    capsys.readouterr()
    assert command(*arguments) == 0
    text = capsys.readouterr().out
    assert "--streams first" not in text
    restored = restore(finished)
    classes = restored.data.classes
    sample = restored.data.test[3]
    heads = streams.load_heads(restored.model, finished)
    assert heads is not None
    with torch.no_grad():
        inputs = collate([sample]).inputs
        logits = [*heads(restored.model.streams(inputs)), restored.model(inputs)]
    for rank, row in enumerate(table(text)):
        for (confidence, name), values in zip(row, logits, strict=True):
            expected = values[0].softmax(-1)
            assert confidence == f"{expected.sort(descending=True).values[rank]:.2%}"
            assert confidence == f"{expected[classes.index(name)]:.2%}"  # of equals any
    assert text.startswith(f"test 3, true class {classes[sample.label]}\nrgb")
    assert text.splitlines()[1].split() == ["rgb", "depth", "rgb+depth"]


def test_files_give_what_the_data_set_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_resnets(monkeypatch)
    root, output = tmp_path / "ntu", tmp_path / "run"
    miniature.ntu(root)
    assert train.main([*VIDEO, "--root", str(root), "--output", str(output)]) == 0
    path = output / "best.pt"
    name = "S001C001P003R001A002"
    restored = restore(path)
    index = [clip.name for clip in restored.data.test.clips].index(name)  # type: ignore[attr-defined]
    (expected,) = predictions.of_split(restored, path, "test", [index])
    moved = root.rename(tmp_path / "elsewhere")
    files = [next(moved.rglob(f"{name}_rgb.avi")), next(moved.rglob(name))]
    capsys.readouterr()
    assert command(path, *files, "--output", tmp_path / "p.png") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}, true class eat meal")
    without_data = restore(path, samples="none")
    (found,) = predictions.of_files(without_data, path, files)
    assert (found.name, found.label) == (name, expected.label)
    for stream, confidences in expected.confidences.items():
        assert torch.equal(found.confidences[stream], confidences)
    older = checkpoint.load(path)
    del older["data"]["forms"]  # which older versions do not write
    checkpoint.save(older, path)
    moved.rename(root)
    assert len(restore(path).data.test) == len(restored.data.test)
    files = [root / file.relative_to(moved) for file in files]
    assert len(list(predictions.of_files(restore(path, samples="none"), path, files))) == 1


def test_new_recordings_need_neither_the_training_set_nor_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_resnets(monkeypatch)
    root, output = tmp_path / "mine", tmp_path / "run"
    kinds = {"rgb": ("avi", 20), "depth": ("16-bit", 12), "thermal": ("grey.png", 9)}
    lists = {
        "train.txt": ["a/1 0", "b/1 1", "a/2 0", "b/2 1"],
        "test.txt": ["a/3 0", "b/3 1"],
        "classes.txt": ["sit", "stand"],
    }
    miniature.clips(root, lists, kinds)
    chosen = ["--data", "clips", *VIDEO[2:], "--modalities", *kinds]
    assert train.main([*chosen, "--root", str(root), "--output", str(output)]) == 0
    path = output / "best.pt"
    restored = restore(path)
    expected = list(predictions.of_split(restored, path, "test", [0, 1]))
    capsys.readouterr()
    assert command(path, "--index", 0, "--output", tmp_path / "p.png") == 0
    assert capsys.readouterr().out.startswith("a/3, true class sit\n")
    moved = root.rename(tmp_path / "new")
    (moved / "train.txt").unlink()
    (moved / "new.txt").write_text("a/3\nb/3\n")
    files = [moved / "rgb" / "b" / "3.avi", moved / "depth" / "b" / "3", moved / "thermal" / "b/3"]
    for given, places in (
        ([moved / "new.txt"], (0, 1)),
        ([moved / "test.txt"], (0, 1)),
        (files, (1,)),
    ):
        assert command(path, *given, "--output", tmp_path / "p.png") == 0
        text = capsys.readouterr().out
        assert ("true class" in text) == (given[0].name == "test.txt")
        found = list(predictions.of_files(restore(path, samples="none"), path, given))
        assert [prediction.name for prediction in found] == [expected[i].name for i in places]
        for ours, place in zip(found, places, strict=True):
            confidences = expected[place].confidences
            assert ours.confidences.keys() == confidences.keys() == {"rgb+depth+thermal"}
            for stream, values in confidences.items():
                # A batch of another size may change a convolution's last bits.
                tolerance = 0 if len(places) == len(expected) else 1e-6
                torch.testing.assert_close(ours.confidences[stream], values, rtol=0, atol=tolerance)
    assert command(path, moved, "--output", tmp_path / "p.png") == 0
    assert capsys.readouterr().out.count("rgb+depth+thermal") == 6
    assert command(path, *files[:2]) == 2
    assert "the sample b/3 lacks thermal" in capsys.readouterr().err


@pytest.mark.parametrize("standardize", [False, True])
def test_new_arrays_need_neither_the_training_file_nor_labels(
    tmp_path: Path,
    standardize: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predict, "MOST_SHOWN", 2)
    random = np.random.default_rng(0)
    root, output = tmp_path / "root", tmp_path / "run"
    root.mkdir()
    for part, samples in (("train", 12), ("test", 25)):
        arrays = {
            "a": 3 + random.standard_normal((samples, 4, 3)),
            "b": random.standard_normal((samples, 4, 2)),
        }
        label = np.arange(samples) % 2
        classes = np.array(["sit", "stand"])
        np.savez(root / f"{part}.npz", label=label, classes=classes, **arrays)
    tiny = ["--epochs", "1", "--model.hidden-size", "8", "--device", "cpu"]
    form = [] if standardize else ["--no-standardize"]
    arguments = ["--data", "arrays", "--root", str(root), "--output", str(output), *tiny, *form]
    assert train.main(arguments) == 0
    path = output / "best.pt"
    restored = restore(path)
    expected = list(predictions.of_split(restored, path, "test", range(25)))
    (root / "train.npz").unlink()
    (root / "test.npz").unlink()
    np.savez(root / "new.npz", **arrays)
    capsys.readouterr()
    picture = tmp_path / "picture.png"
    for given in (root, root / "new.npz"):
        assert command(path, given, "--output", picture) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{root / 'new.npz'} 0\n")
        assert "true class" not in text
        assert "the first 2 of 25 are shown here and drawn in" in text
        assert len(table(text)) == 4
    found = list(predictions.of_files(restore(path, samples="none"), path, [root]))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.label is None
        assert torch.equal(ours.confidences["a+b"], theirs.confidences["a+b"])
    np.savez(root / "new.npz", a=arrays["a"], label=label)
    assert command(path, root) == 2
    assert "modalities must be those of" in capsys.readouterr().err
    np.savez(root / "new.npz", label=label, **arrays)
    assert command(path, root, "--output", picture) == 0
    assert "new.npz 1, true class stand" in capsys.readouterr().out
    older = checkpoint.load(path)
    del older["data"]["moments"]
    checkpoint.save(older, path)
    assert command(path, root, "--output", picture) == (2 if standardize else 0)
    assert ("an older version wrote it" in capsys.readouterr().err) == standardize


CLASSES = ("sit, or kneel", 'the "T" pose', "label", "fall")
"""Names that a CSV file has to quote, and one that it has already."""


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of arrays whose samples differ in length and whose batches are padded; one class has
    no test sample."""
    root = tmp_path_factory.mktemp("skewed")
    random = np.random.default_rng(0)
    for part, samples in (("train", 40), ("validation", 9), ("test", 23)):
        label = np.minimum(np.arange(samples) % 7, 2 if part == "test" else 3)
        features = {
            name: random.standard_normal((samples, 6, size)) + (label == target)[:, None, None]
            for name, size, target in (("a", 3, 1), ("b", 2, 2))
        }
        length = random.integers(1, 7, samples)
        classes = {"classes": np.array(CLASSES)} if part == "train" else {}
        np.savez(root / f"{part}.npz", label=label, length=length, **features, **classes)
    return root


def trained(root: Path, output: Path, *more: str) -> Path:
    arguments = ["--data", "arrays", "--root", str(root), "--output", str(output), *more]
    tiny = ["--epochs", "2", "--model.hidden-size", "8", "--device", "cpu"]
    assert train.main([*arguments, *tiny, "--optimizer.learning-rate", "0.01"]) == 0
    return output / "best.pt"


def rows_of(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of a file of scores, by stream."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [r for r in rows if r["stream"] == name] for name in {r["stream"] for r in rows}}


def numbers(rows: list[dict[str, str]], names: Sequence[str]) -> dict[str, Any]:
    """A report's numbers, from nothing but the probabilities and labels of a file of scores."""
    labels = [names.index(row["label"]) for row in rows]
    scores = np.array([[float(row[name]) for name in names] for row in rows])
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    each = [float(row[k] / row.sum()) if row.sum() else None for k, row in enumerate(confusion)]
    present = [accuracy for accuracy in each if accuracy is not None]
    return {
        "accuracy": confusion.diagonal().sum() / len(labels),
        "mean_class_accuracy": sum(present) / len(present),
        "per_class_accuracy": each,
        "confusion": confusion.tolist(),
        "samples": len(labels),
        "loss": pytest.approx(-np.log(scores[np.arange(len(labels)), labels]).mean(), rel=1e-6),
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_have_the_numbers_of_evaluate(
    skewed: Path,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predict, "MOST_SHOWN", 2)
    path = trained(skewed, tmp_path / "run", "--precision", precision)
    report, scores = tmp_path / "report.json", tmp_path / "scores.csv"
    capsys.readouterr()
    assert evaluate.main([str(path), "--streams", "--output", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    arguments = ["--scores", scores, "--workers", 1, "--output", tmp_path / "p.png"]
    assert command(path, *arguments) == 0
    text = capsys.readouterr().out.splitlines()
    assert "the first 2 of 23 are shown here and drawn in" in "\n".join(text)
    assert sum("true class" in line for line in text) == 2
    assert text[-3:] == printed[-3:]
    assert text[-3].startswith("test: accuracy")
    header = ["sample", "label", "stream", "predicted", *CLASSES]
    header[6] = "label (class 2)"
    with scores.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == header
    rows, expected = rows_of(scores), json.loads(report.read_text())
    assert rows.keys() == {"a", "b", "a+b"}
    for stream, theirs in {"a+b": expected, **expected["streams"]}.items():
        ours = numbers(rows[stream], header[4:])
        assert ours == {name: theirs[name] for name in ours}
        assert ours["samples"] == 23
        for row in rows[stream]:
            best = max(header[4:], key=lambda name, row=row: float(row[name]))
            assert row["predicted"] == best
            assert sum(float(row[name]) for name in header[4:]) == pytest.approx(1, abs=1e-12)
    samples = [row["sample"] for row in rows["a+b"]]
    assert samples == [f"test {index}" for index in range(23)]


def test_scores_of_files_and_of_single_samples(
    skewed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predict, "MOST_SHOWN", 2)
    path = trained(skewed, tmp_path / "run")
    with np.load(skewed / "test.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "known.npz", **arrays)
    del arrays["label"]
    np.savez(tmp_path / "new.npz", **arrays)
    whole, files, single = (tmp_path / f"{name}.csv" for name in ("whole", "files", "single"))
    more = ["--output", tmp_path / "p.png", "--scores"]
    assert command(path, *more, whole) == 0
    capsys.readouterr()
    assert command(path, tmp_path / "known.npz", tmp_path / "new.npz", *more, files) == 0
    text = capsys.readouterr().out
    assert "files: accuracy" in text
    assert "23 more samples have no label" in text
    assert command(path, "--index", 4, 2, "--batch-size", 1, *more, single) == 0
    expected, found = rows_of(whole)["a+b"], rows_of(files)["a+b"]
    for place, row in enumerate(expected):
        known, new = found[place], found[23 + place]
        assert known == {**row, "sample": f"{tmp_path / 'known.npz'} {place}"}
        assert new == {**row, "sample": f"{tmp_path / 'new.npz'} {place}", "label": ""}
    assert [row["sample"] for row in rows_of(single)["a+b"]] == ["test 4", "test 2"]
    for row, place in zip(rows_of(single)["a+b"], (4, 2), strict=True):
        for name in ("predicted", "label"):
            assert row[name] == expected[place][name]
        for name in CLASSES[:2]:
            assert float(row[name]) == pytest.approx(float(expected[place][name]), rel=1e-5)


def test_a_split_is_read_batch_by_batch(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_run / "best.pt"
    restored = restore(path)
    read: list[int] = []
    inner = type(restored.data.test).__getitem__

    def get(self: Any, index: int) -> Any:
        read.append(index)
        return inner(self, index)

    monkeypatch.setattr(type(restored.data.test), "__getitem__", get)
    found = predictions.of_split(restored, path, "test")
    assert next(found).name == "test 0"
    assert read == list(range(len(read)))
    assert 5 <= len(read) <= 10  # a batch of 5, and the next one that is loaded meanwhile
    assert [prediction.name for prediction in found][-1] == "test 31"


def test_scores_that_cannot_be_finished_leave_the_file_of_before(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("before")
    inner = predictions._logits
    batches: list[Any] = []

    def logits(*arguments: Any) -> Any:
        batches.append(arguments)
        if len(batches) == 3:
            raise UserError("the disk is gone")
        return inner(*arguments)

    monkeypatch.setattr(predictions, "_logits", logits)
    assert command(tiny_run / "best.pt", "--scores", scores) == 2
    assert scores.read_text() == "before"


def test_mistakes_end_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_rgb.avi").write_bytes(b"")
    for arguments, message in (
        ([], "give the files of a sample or more, --index, or --scores FILE.csv for all of"),
        ([tmp_path / "a_rgb.avi", "--index", 1], "or --index, not both"),
        (
            [tmp_path / "a_rgb.avi"],
            "the samples of synthetic are not files: choose some by --index",
        ),
        (["--index", 32], "--index must be in 0..31 for test, but is 32"),
        (["--index", 0, "--top", 0], "--top must be 1 or more, but is 0"),
        (["--index", 0, "--output", tmp_path / "no" / "p.png"], "No such file or directory"),
        (["--scores", tmp_path / "no" / "s.csv"], "No such file or directory"),
    ):
        assert command(finished, *arguments) == 2
        *device, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert all(line.startswith("device cpu (") for line in device)
        assert len(device) <= 1
        assert message in error
