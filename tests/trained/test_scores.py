from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from mmixer_kernels.errors import UserError
from mmixer_kernels.trained import scores
from mmixer_kernels.trained.predictions import Prediction


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("sit", "stand"), ["sit", "stand"]),
        (("sit", "sit", "stream"), ["sit", "sit (class 1)", "stream (class 2)"]),
        (("sit (class 2)", "sit", "sit"), ["sit (class 2)", "sit", "sit (class 2) (class 2)"]),
        (("", "a"), ["(class 0)", "a"]),
    ],
)
def test_every_column_has_a_name_of_its_own(classes: tuple[str, ...], expected: list[str]) -> None:
    assert scores.columns(classes) == expected


def test_a_file_reads_back_to_the_bit_whatever_the_names(tmp_path: Path) -> None:
    classes, path = ('a "quoted", name', "two\nlines", "é"), tmp_path / "scores.csv"
    logits = {"x": torch.tensor([0.01, 0.010000001, -90.0]), "x+y": torch.tensor([1.0, 2.0, 3.0])}
    with scores.writing(path, classes) as write:
        write(Prediction("one, two", 2, {}, logits))
        write(Prediction("three", None, {}, logits))
        assert not path.exists()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows] == ["one, two", "one, two", "three", "three"]
    assert [row["label"] for row in rows] == ["é", "é", "", ""]
    for row, values in zip(rows, [*logits.values(), *logits.values()], strict=True):
        found = torch.tensor([float(row[name]) for name in classes], dtype=torch.float64)
        assert torch.equal(found, values.double().softmax(-1))
        assert row["predicted"] == classes[int(values.argmax())] == classes[int(found.argmax())]
    assert rows[0]["predicted"] == "two\nlines"
    alike = logits["x"].softmax(-1)
    assert alike[0] == alike[1]  # in float32 the first class would win


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no/scores\.csv"),
        scores.writing(tmp_path / "no" / "scores.csv", ("a", "b")),
    ):
        pass
