"""The experiments' pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def dots(rows: Mapping[str, Sequence[float]], bounds: Mapping[str, float] | None = None) -> Figure:
    """The accuracies of networks, a row each: a dot per training, a bar at their mean.

    Args:
        rows: accuracies 0..1 by label.
        bounds: accuracies to compare with, as vertical lines.
    """
    figure = _figure(7, 0.9 + 0.42 * len(rows))
    axis = figure.subplots()
    for place, values in enumerate(rows.values()):
        axis.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.5, markersize=5)
        axis.plot([mean(values)], [place], "|", color="black", markersize=16, markeredgewidth=2)
    for colour, (label, value) in zip(COLOURS[1:], (bounds or {}).items(), strict=False):
        axis.axvline(value, color=colour, linestyle="--", linewidth=1.2, label=label)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    _percent(axis.xaxis)
    axis.set_xlabel("test accuracy (dots: trainings, bars: means)")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    if bounds:
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    return figure


def classes(names: Sequence[str], accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy by class of two networks side by side, in the order given (Figure 4)."""
    figure = _figure(max(5.0, 0.32 * len(names) + 2), 3.8)
    axis = figure.subplots()
    width = 0.8 / len(accuracies)
    for number, (label, values) in enumerate(accuracies.items()):
        places = [
            place + (number - (len(accuracies) - 1) / 2) * width for place in range(len(names))
        ]
        axis.bar(places, values, width=width, color=COLOURS[number], label=label)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9 if len(names) <= 30 else 7)
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("test accuracy")
    _percent(axis.yaxis)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def learning_curves(histories: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> Figure:
    """Training loss and validation accuracy by epoch: a colour per engine, a line per seed."""
    figure = _figure(9, 3.8)
    styles = ("-", "--", ":", "-.")
    axes = figure.subplots(1, 2)
    for axis, key in zip(axes, ("loss", "validation_accuracy"), strict=True):
        for number, (label, runs) in enumerate(histories.items()):
            for run in runs:
                points = [(record["epoch"], record[key]) for record in run if key in record]
                axis.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[number],
                    linestyle=styles[number % len(styles)],
                    linewidth=2.5 - number,
                    label=label if run is runs[0] else None,
                )
        axis.set_xlabel("epoch")
        axis.set_ylabel(key.replace("_", " ") if key != "loss" else "training loss")
        axis.grid(color="0.9")
    _percent(axes[1].yaxis)
    axes[0].legend(frameon=False)
    return figure


def noise(accuracies: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Accuracy against the noise on a modality: an axis per modality, a line per network.

    Args:
        accuracies: accuracies 0..1 by modality, network and condition ("all there", "absent",
            levels of noise).
    """
    figure = _figure(4.2 * len(accuracies), 3.6)
    axes = figure.subplots(1, len(accuracies), squeeze=False, sharey=True)[0]
    for axis, (modality, networks) in zip(axes, accuracies.items(), strict=True):
        for colour, (label, values) in zip(COLOURS, networks.items(), strict=False):
            axis.plot(range(len(values)), list(values.values()), "o-", color=colour, label=label)
        conditions = list(next(iter(networks.values())))
        axis.set_xticks(range(len(conditions)), conditions)
        axis.set_xlabel(f"{modality} at test time")
        axis.grid(color="0.9")
        _percent(axis.yaxis)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def lengths(networks: Mapping[str, Mapping[int, tuple[Sequence[float], float]]]) -> Figure:
    """Accuracy and time against T, a line per network.

    Args:
        networks: the trainings' accuracies and the milliseconds per sample, by label and T.
    """
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for colour, (label, points) in zip(COLOURS, networks.items(), strict=False):
        steps = list(points)
        for step, (values, _) in points.items():
            left.plot([step] * len(values), values, ".", color=colour, alpha=0.5)
        left.plot(steps, [mean(v) for v, _ in points.values()], "o-", color=colour, label=label)
        right.plot(steps, [time for _, time in points.values()], "o-", color=colour, label=label)
    left.set_ylabel("test accuracy")
    _percent(left.yaxis)
    right.set_ylabel("forward + backward, ms a sample")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("T, steps of the recurrence")
        axis.grid(color="0.9")
        axis.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None))
