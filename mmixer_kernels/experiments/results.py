"""The results of an experiment's trainings, and the form in which they are reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .networks import Network
from .runs import Plan, Run
from .seeds import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Claim:
    """An order that the paper reports: `first` is ahead of `second`, or at least not behind.

    Args:
        values: accuracies of both, by training.
    """

    first: str
    second: str
    values: tuple[dict[Trained, float], dict[Trained, float]]


@dataclass
class Report:
    """An experiment's outcome.

    Args:
        tables: rows of cells of each table, the header first.
        claims: the paper's orders, to be compared with what was found.
        notes: sentences below the tables.
        numbers: numbers that JSON has besides the trainings.
        figure: a picture, if there is something to see.
    """

    tables: list[list[list[str]]]
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    figure: Figure | None = None


@dataclass(frozen=True)
class Results:
    """The finished trainings of a plan."""

    plan: Plan

    def runs(self, network: Network) -> list[Run]:
        """The trainings of a network."""
        return self.plan.runs(network)

    def accuracies(self, network: Network) -> dict[Trained, float]:
        """The test accuracies of a network, 0..1."""
        return {(run.seed, run.fold): run.result()["accuracy"] for run in self.runs(network)}

    def stream_accuracies(self, network: Network) -> dict[str, dict[Trained, float]]:
        """The test accuracies of each modality's stream (Eq. 15), 0..1."""
        reports = {
            (run.seed, run.fold): run.report("streams")["streams"] for run in self.runs(network)
        }
        return {
            stream: {trained: report[stream]["accuracy"] for trained, report in reports.items()}
            for stream in next(iter(reports.values()))
        }
