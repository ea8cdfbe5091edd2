from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from mmixer_kernels.training import plots


def result(classes: int) -> dict[str, Any]:
    return {
        "classes": [f"class number {i}" for i in range(classes)],
        "confusion": [
            [(7 * i + 3 * j) % 5 + 30 * (i == j) for j in range(classes)] for i in range(classes)
        ],
        "per_class_accuracy": [None, *(i / classes for i in range(1, classes))],
        "accuracy": 0.5,
        "mean_class_accuracy": 0.4,
        "samples": 100,
        "epoch": 2,
    }


HISTORY = [
    {
        "epoch": epoch,
        "loss": 2.0 / epoch,
        "accuracy": 1 - 0.5 / epoch,
        "validation_loss": 2.2 / epoch,
        "validation_accuracy": 1 - 0.6 / epoch,
    }
    for epoch in (1, 2, 3)
]


@pytest.mark.parametrize("classes", [2, 31])
def test_plots_are_written_as_png(tmp_path: Path, classes: int) -> None:
    plots.write(tmp_path, HISTORY, result(classes))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "class_accuracy.png",
        "confusion.png",
        "learning_curves.png",
    ]
    for path in tmp_path.iterdir():
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:])) >= 500
    assert "matplotlib.pyplot" not in sys.modules


def test_class_accuracy_is_sorted_and_leaves_out_absent_classes() -> None:
    axis = plots.class_accuracy(result(4)).axes[0]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["class number 3", "class number 2", "class number 1"]
    bars = [bar for bar in axis.patches if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == [0.75, 0.5, 0.25]


def test_confusion_rows_are_parts_of_the_true_class() -> None:
    image = plots.confusion(result(3)).axes[0].images[0].get_array()
    assert image is not None
    assert image.sum(axis=1).tolist() == pytest.approx([1, 1, 1])
    assert image[0, 0] == pytest.approx(30 / 34)
