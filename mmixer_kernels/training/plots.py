"""A run's plots as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING, VALIDATION, TEST = "tab:blue", "tab:orange", "tab:green"


def write(output: Path, history: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Writes learning_curves.png, confusion.png and class_accuracy.png.

    Args:
        history: the records of metrics.jsonl.
        result: the contents of result.json.
    """
    for name, figure in (
        ("learning_curves", learning_curves(history, result)),
        ("confusion", confusion(result)),
        ("class_accuracy", class_accuracy(result)),
    ):
        figure.savefig(output / f"{name}.png", dpi=150, bbox_inches="tight")


def learning_curves(history: Sequence[dict[str, Any]], result: dict[str, Any]) -> Figure:
    """Loss and accuracy by epoch, with the epoch that was tested and its test accuracy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    marker = "o" if len(history) < 20 else ""
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for key, label, colour in (
            (name, "training", TRAINING),
            (f"validation_{name}", "validation", VALIDATION),
        ):
            points = [(record["epoch"], record[key]) for record in history if key in record]
            epochs, values = zip(*points, strict=True)
            axis.plot(epochs, values, color=colour, marker=marker, markersize=3, label=label)
        tested = result["epoch"]
        axis.axvline(
            tested,
            color="0.6",
            linewidth=1,
            linestyle="--",
            zorder=0,
            label=f"tested epoch, {tested}",
        )
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    axes[0].set_ylim(bottom=0)
    axes[1].plot(
        result["epoch"],
        result["accuracy"],
        marker="*",
        markersize=11,
        linestyle="",
        color=TEST,
        label=f"test, {result['accuracy']:.1%}",
    )
    axes[1].set_ylim(0, 1.02)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        axis.legend(frameon=False)
    return figure


def confusion(result: dict[str, Any]) -> Figure:
    """The confusion matrix, each row as fractions of its class's samples."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    classes, counts = result["classes"], result["confusion"]
    size = max(3.5, 0.17 * len(classes) + 1.5)
    figure = Figure(figsize=(size * 1.3, size * 1.3))
    axis = figure.subplots()
    parts = [[count / max(1, sum(row)) for count in row] for row in counts]
    # The root shows rare confusions beside a strong diagonal.
    image = axis.imshow(parts, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    ticks = range(len(classes))
    font = 9 if len(classes) <= 30 else 7
    axis.set_xticks(ticks, classes, rotation=90, fontsize=font)
    axis.set_yticks(ticks, classes, fontsize=font)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(f"Test accuracy {result['accuracy']:.1%}, {result['samples']} samples")
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    bar.set_label("part of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    if len(classes) <= 20:
        for row, values in enumerate(parts):
            for column, value in enumerate(values):
                if value:
                    axis.text(
                        column,
                        row,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if value > 0.4 else "black",
                    )
    return figure


def class_accuracy(result: dict[str, Any]) -> Figure:
    """Accuracy by class, best first, as in the paper's Figure 4."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    present = [
        (name, value)
        for name, value in zip(result["classes"], result["per_class_accuracy"], strict=True)
        if value is not None
    ]
    present.sort(key=lambda item: -item[1])
    names, values = [name for name, _ in present], [value for _, value in present]
    figure = Figure(figsize=(max(4.0, 0.24 * len(names) + 1.5), 3.5))
    axis = figure.subplots()
    axis.bar(range(len(names)), values, color=TRAINING, width=0.75)
    mean = result["mean_class_accuracy"]
    axis.axhline(mean, color=VALIDATION, linewidth=1.2, label=f"mean {mean:.1%}")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9 if len(names) <= 30 else 8)
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure
