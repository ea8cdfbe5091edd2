"""Experiments that the paper does not have: engines, missing modalities, their number, length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import figures, timing
from .networks import GRU, M_MIXER, SELF, Network
from .results import Report, Results
from .seeds import Trained, lead, over_folds, over_seeds

DEGRADED = (M_MIXER, SELF, GRU)
History = list[dict[str, Any]]
"""The records of a training's epochs."""


def engines(results: Results, networks: Sequence[Network]) -> Report:
    """The same training by every engine, whose curves lie on one another."""
    histories = {
        network.label: [run.history() for run in results.runs(network)] for network in networks
    }
    first = networks[0].label
    rows = [
        ["engine", "accuracy, %", f"training loss: farthest from {first}'s", "validation: farthest"]
    ]
    for network in networks:
        both = histories[network.label], histories[first]
        loss = _farthest(*both, "loss")
        validation = _farthest(*both, "validation_accuracy")
        accuracy = str(over_seeds(results.accuracies(network)))
        rows.append([network.label, accuracy, f"{loss:.1e}", f"{100 * validation:.2f} points"])
    notes = []
    if len(histories[first]) > 1:
        seeds = zip(*histories[first], strict=True)
        spans = [[record["loss"] for record in records] for records in seeds]
        between = max(max(losses) - min(losses) for losses in spans)
        notes.append(f"Between seeds, {first}'s training loss differs by up to {between:.1e}.")
    return Report([rows], notes=notes, figure=figures.learning_curves(histories))


def _farthest(runs: Sequence[History], others: Sequence[History], key: str) -> float:
    """The largest difference of a number between two engines, over seeds and epochs."""
    return max(
        abs(record[key] - other[key])
        for run, other_run in zip(runs, others, strict=True)
        for record, other in zip(run, other_run, strict=True)
        if key in record
    )


def missing(results: Results) -> Report:
    """The accuracy with a modality absent or noised at test time."""
    accuracies: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[list[str]] = []
    for network in DEGRADED:
        reports = [run.report("missing") for run in results.runs(network)]
        for modality, conditions in reports[0]["missing"].items():
            values = {"all there": mean(report["accuracy"] for report in reports)}
            for level in conditions["noise"]:
                values[f"noise {level}"] = mean(
                    report["missing"][modality]["noise"][level]["accuracy"] for report in reports
                )
            values["absent"] = mean(
                report["missing"][modality]["absent"]["accuracy"] for report in reports
            )
            accuracies.setdefault(modality, {})[network.label] = values
            rows.append([network.label, modality, *(f"{100 * v:.2f}" for v in values.values())])
            header = ["network", "modality", *(f"{condition}, %" for condition in values)]
    note = (
        "Noise is white, its standard deviation given in those of the modality's own inputs; an "
        "absent modality's inputs are zeros. Nothing was trained for either."
    )
    drawn = figures.noise(accuracies)
    return Report([[header, *rows]], notes=[note], numbers={"accuracies": accuracies}, figure=drawn)


def quantized(results: Results) -> Report:
    """Each trained M-Mixer with float32 weights, and with int8 ones in its MCUs."""
    reports = {(run.seed, run.fold): run.report("quantized") for run in results.runs(M_MIXER)}
    accuracies: dict[str, dict[Trained, float]] = {
        "float32": {trained: report["accuracy"] for trained, report in reports.items()},
        "int8": {trained: report["quantized"]["accuracy"] for trained, report in reports.items()},
    }
    folds = results.plan.folds
    rows = [["weights", "accuracy, %", "float32 is ahead by", *(["folds, %"] if folds else [])]]
    for label, values in accuracies.items():
        ahead = "" if label == "float32" else str(lead(accuracies["float32"], values))
        row = [label, str(over_seeds(values)), ahead]
        if folds:
            row.append(" ".join(f"{100 * value:.1f}" for value in over_folds(values).values()))
        rows.append(row)
    dots = {label: list(values.values()) for label, values in accuracies.items()}
    note = "Nothing was trained for int8: the weights are the trained ones, rounded."
    return Report([rows], notes=[note], numbers={"accuracies": dots}, figure=figures.dots(dots))


def modalities(results: Results, networks: Sequence[Network]) -> Report:
    """Two and more modalities, and the accuracy of each stream by itself."""
    rows = [["modalities", "classes", "accuracy, %", "its streams alone, %"]]
    dots, numbers = {}, {}
    for network in networks:
        accuracies = results.accuracies(network)
        streams = results.stream_accuracies(network)
        classes = len(results.runs(network)[0].result()["classes"])
        alone = ", ".join(
            f"{name} {100 * mean(values.values()):.1f}" for name, values in streams.items()
        )
        rows.append([network.label, str(classes), str(over_seeds(accuracies)), alone])
        dots[network.label] = list(accuracies.values())
        numbers[network.label] = {name: list(values.values()) for name, values in streams.items()}
    return Report([rows], numbers={"streams": numbers}, figure=figures.dots(dots))


def length(results: Results, networks: Sequence[Network]) -> Report:
    """Accuracy and time against the number of steps."""
    runs = {network: results.runs(network)[0] for network in networks}
    times = timing.of_samples([run.checkpoint for run in runs.values()])
    points: dict[str, dict[int, tuple[list[float], float]]] = {}
    rows = [["network", "T", "accuracy, %", "forward + backward, ms a sample"]]
    for network, timed in zip(networks, times, strict=True):
        accuracies = results.accuracies(network)
        unit = GRU if network.options[: len(GRU.options)] == GRU.options else M_MIXER
        points.setdefault(unit.label, {})[timed.steps] = (
            list(accuracies.values()),
            timed.milliseconds,
        )
        spread = str(over_seeds(accuracies))
        rows.append([network.label, str(timed.steps), spread, f"{timed.milliseconds:.3f}"])
    for label, values in points.items():
        points[label] = dict(sorted(values.items()))
    note = (
        "The time is of the whole network, extractors included, on a batch of the data set, with "
        "one thread on a CPU; measured in turns after all trainings, the median."
    )
    numbers = {"accuracies and milliseconds by T": points}
    return Report([rows], notes=[note], numbers=numbers, figure=figures.lengths(points))
