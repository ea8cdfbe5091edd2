"""Predictions of single samples, by streams and together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data import miniature
from networks import shrink_resnets

from mmixer_kernels import evaluate, predict, train
from mmixer_kernels.data import collate
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
    rows = [line.split() for line in text.splitlines() if "%" in line]
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
    assert len(predictions.of_files(restore(path, samples="none"), path, files)) == 1


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
    expected = predictions.of_split(restored, path, "test", [0, 1])
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
        found = predictions.of_files(restore(path, samples="none"), path, given)
        assert [prediction.name for prediction in found] == [expected[i].name for i in places]
        for ours, place in zip(found, places, strict=True):
            confidences = expected[place].confidences
            assert ours.confidences.keys() == confidences.keys() == {"rgb+depth+thermal"}
            for stream, values in confidences.items():
                assert torch.equal(ours.confidences[stream], values)
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
    monkeypatch.setattr(predict, "MOST_DRAWN", 2)
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
    form = ["--standardize"] if standardize else []
    arguments = ["--data", "arrays", "--root", str(root), "--output", str(output), *tiny, *form]
    assert train.main(arguments) == 0
    path = output / "best.pt"
    restored = restore(path)
    expected = predictions.of_split(restored, path, "test", range(25))
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
        assert "the first 2 of 25 are drawn in" in text
    found = predictions.of_files(restore(path, samples="none"), path, [root])
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


def test_mistakes_end_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_rgb.avi").write_bytes(b"")
    for arguments, message in (
        ([], "give the files of a sample or more, or --index"),
        ([tmp_path / "a_rgb.avi", "--index", 1], "give the files of a sample or more, or --index"),
        (
            [tmp_path / "a_rgb.avi"],
            "the samples of synthetic are not files: choose some by --index",
        ),
        (["--index", 32], "--index must be in 0..31 for test, but is 32"),
        (["--index", 0, "--top", 0], "--top must be 1 or more, but is 0"),
        (["--index", 0, "--output", tmp_path / "no" / "p.png"], "No such file or directory"),
    ):
        assert command(finished, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert message in error
