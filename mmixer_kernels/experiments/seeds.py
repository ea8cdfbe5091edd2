"""Means over seeds and folds, and how certain their differences are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev

Trained = tuple[int, int | None]
"""A training of a network: its seed, and its fold or None."""

STUDENT = {
    **{1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26},
    **{10: 2.23, 12: 2.18, 15: 2.13, 20: 2.09, 30: 2.04},
}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom; those left out have the next
smaller one's, which is on the safe side."""


@dataclass(frozen=True)
class Spread:
    """A mean and the standard deviation over seeds, None of a single one."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        """The mean and deviation as text, in percent."""
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.2f}"
        return f"{100 * self.mean:.2f}{deviation}"


def over_seeds(values: Mapping[Trained, float]) -> Spread:
    """The spread over seeds; a seed's value is the mean of its folds."""
    seeds = list(_means(values, 0).values())
    return Spread(mean(seeds), stdev(seeds) if len(seeds) > 1 else None)


def over_folds(values: Mapping[Trained, float]) -> dict[int | None, float]:
    """Each fold's mean over seeds."""
    return _means(values, 1)


@dataclass(frozen=True)
class Lead:
    """The lead of one network over another.

    Args:
        mean: mean of the differences between trainings with the same seed and fold.
        margin: half of its 95 % confidence interval, over folds where there are folds (their people
            differ, which seeds do not show) and else over seeds; None of a single one.
    """

    mean: float
    margin: float | None

    def __str__(self) -> str:
        """The lead as text, in percentage points."""
        margin = "" if self.margin is None else f" ± {100 * self.margin:.2f}"
        return f"{100 * self.mean:+.2f}{margin}"

    def verdict(self) -> str:
        """The answer in words to whether the first is ahead."""
        if self.mean == 0:
            return "equal"
        if self.margin is None:
            return "ahead in the one training" if self.mean > 0 else "behind in the one training"
        if abs(self.mean) <= self.margin:
            return "ahead, within the noise" if self.mean > 0 else "behind, within the noise"
        return "ahead" if self.mean > 0 else "behind"


def lead(first: Mapping[Trained, float], second: Mapping[Trained, float]) -> Lead:
    """The lead of `first` over `second`, which have the same trainings."""
    differences = {trained: first[trained] - second[trained] for trained in first}
    folds = {fold for _, fold in differences}
    units = list(_means(differences, 1 if len(folds) > 1 else 0).values())
    if len(units) == 1:
        return Lead(units[0], None)
    error = stdev(units) / math.sqrt(len(units))
    return Lead(mean(units), _quantile(len(units) - 1) * error)


def _quantile(freedom: int) -> float:
    return STUDENT[max(known for known in STUDENT if known <= freedom)]


def _means(values: Mapping[Trained, float], part: int) -> dict[int | None, float]:
    """The means of the values that have a part of their keys in common."""
    groups: dict[int | None, list[float]] = {}
    for trained, value in values.items():
        groups.setdefault(trained[part], []).append(value)
    return {key: mean(group) for key, group in groups.items()}


def pooled(values: Iterable[float | None]) -> float | None:
    """The mean of the values that there are; None when there is none."""
    present = [value for value in values if value is not None]
    return mean(present) if present else None
