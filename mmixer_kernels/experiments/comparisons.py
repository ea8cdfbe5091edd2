"""Tables 5 to 7: M-Mixer beside what others have published on the same data."""

from __future__ import annotations

from statistics import stdev

from ..data import SyntheticOptions
from . import figures, published
from .networks import M_MIXER
from .results import Report, Results
from .seeds import over_folds, over_seeds


def table(results: Results) -> Report:
    """The published rows of the data set, and ours measured."""
    base = results.plan.base
    accuracies = results.accuracies(M_MIXER)
    spread = over_seeds(accuracies)
    modalities = " + ".join(results.runs(M_MIXER)[0].result()["modalities"])
    rows = [["method", "modalities", "accuracy, %"]]
    bounds = {}
    if isinstance(base.data, SyntheticOptions):
        count = len(base.data.modalities)
        alone = (1 / 2) ** (count - 1)
        rows.append(["bound: one stream alone", "any", f"{100 * alone:.2f}"])
        bounds["one stream alone"] = alone
        if base.data.task == "compare":
            added = (2 ** (count - 1) + 1) / 2**count
            rows.append(["bound: added scores of streams", modalities, f"{100 * added:.2f}"])
            bounds["added scores of streams"] = added
    for method, used, value in published.COMPARISONS.get(base.run.data, []):
        rows.append([method, used, f"{value:.2f}"])
        bounds[method] = value / 100
    rows.append(["**M-Mixer, here**", modalities, f"**{spread}**"])
    report = Report([rows], figure=figures.dots({"M-Mixer": list(accuracies.values())}, bounds))
    if results.plan.folds:
        folds = over_folds(accuracies)
        report.tables.append(_folds(results, folds))
        values = list(folds.values())
        report.notes.append(
            f"The folds' means go from {100 * min(values):.2f} to {100 * max(values):.2f} %, with "
            f"a standard deviation of {100 * stdev(values):.2f} points: people differ more than "
            "seeds do."
            if spread.deviation is not None and stdev(values) > spread.deviation
            else f"The folds' standard deviation is {100 * stdev(values):.2f} points."
        )
    return report


def _folds(results: Results, folds: dict[int | None, float]) -> list[list[str]]:
    rows = [["fold", "tested people", "accuracy, %"]]
    for run in results.runs(M_MIXER)[: len(folds)]:
        subjects = " and ".join(map(str, run.result()["config"]["test_subjects"]))
        rows.append([str(run.fold), subjects, f"{100 * folds[run.fold]:.2f}"])
    return rows
