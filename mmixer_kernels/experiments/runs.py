"""The trainings of an experiment: where each lies, what it still needs, what it found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training import checkpoint, parsing
from ..training.options import Options, RunOptions
from ..training.run import result_relevant
from .networks import CHOSEN_HERE, Network

FOLDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "watch": tuple(
        ("--test-subjects", str(first), str(first + 1), "--validation-subject", "None")
        for first in (1, 3, 5, 7, 9)
    )
}
"""Options of training for each fold of a data set's cross-validation."""
PROG = "python -m mmixer_kernels.experiments"


@dataclass(frozen=True)
class Plan:
    """The common part of all trainings of an invocation.

    Args:
        arguments: arguments of `python -m mmixer_kernels.train`, data set included.
        folder: folder of the trainings.
        folds: options of training for each fold, on each of which every seed is trained; none for
            the data set's own division.
    """

    arguments: tuple[str, ...]
    folder: Path
    seeds: tuple[int, ...]
    folds: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def base(self) -> Options:
        """The options of M-Mixer with the first seed, checked.

        Raises:
            UserError, SystemExit: as `parsing.parse` does; and UserError for an option that the
                experiments choose themselves.
        """
        chosen = parsing.parse(self.arguments, PROG)
        plain = RunOptions()
        ours = {
            "--seed": ("seed", "--seeds"),
            "--output": ("output", "--runs and --output"),
            "--resume": ("resume", "nothing: finished parts are kept by themselves"),
            "--check": ("check", "python -m mmixer_kernels.train"),
        }
        for option, (name, instead) in ours.items():
            if getattr(chosen.run, name) != getattr(plain, name):
                raise UserError(f"{option} is not for experiments: use {instead}")
        for name in CHOSEN_HERE:
            if getattr(chosen.run.model, name) != getattr(plain.model, name):
                raise UserError(
                    f"--model.{name.replace('_', '-')} must be left out: each experiment chooses "
                    "it for its networks"
                )
        return chosen

    def runs(self, network: Network) -> list[Run]:
        """A network's trainings: every seed, and every fold of it."""
        folds = range(len(self.folds)) if self.folds else (None,)
        return [self._run(network, seed, fold) for seed in self.seeds for fold in folds]

    def _run(self, network: Network, seed: int, fold: int | None) -> Run:
        """The one object of a training, which parses its options once."""
        return self._known.setdefault((network, seed, fold), Run(self, network, seed, fold))

    @cached_property
    def _known(self) -> dict[tuple[Network, int, int | None], Run]:
        return {}


@dataclass(frozen=True)
class Run:
    """A training of a network, with a seed and perhaps on a fold."""

    plan: Plan
    network: Network
    seed: int
    fold: int | None

    def __str__(self) -> str:
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.network.name}, seed {self.seed}{fold}"

    @property
    def folder(self) -> Path:
        """The folder of the training."""
        place = self.plan.folder / self.network.name
        return (place if self.fold is None else place / f"fold-{self.fold}") / f"seed-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `python -m mmixer_kernels.train`, but for --resume."""
        options: list[str] = [*self.plan.arguments]
        if self.fold is not None:
            options += self.plan.folds[self.fold]
        options += self.network.options
        if self.fold is not None and self.network.by_fold:
            options += self.network.by_fold[self.fold]
        return [*options, "--seed", str(self.seed), "--output", str(self.folder)]

    @cached_property
    def options(self) -> Options:
        """The options of the training."""
        return parsing.parse(self.arguments, PROG)

    def epochs_done(self) -> int:
        """The number of epochs that are complete."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def needs(self, measures: Iterable[str]) -> list[tuple[str, list[str]]]:
        """The commands that the run still needs, by name and arguments.

        Raises:
            UserError: the folder holds a training with other options.
        """
        commands = []
        if not self._finished():
            begun = any((self.folder / n).exists() for n in (checkpoint.LAST, checkpoint.PREVIOUS))
            commands.append(("train", [*self.arguments, *(["--resume"] if begun else [])]))
        for measure in measures:
            path = self.folder / f"{measure}.json"
            if not path.exists():
                selected = str(self.checkpoint)
                commands.append(("evaluate", [selected, f"--{measure}", "--output", str(path)]))
        return commands

    @property
    def checkpoint(self) -> Path:
        """The weights that are tested."""
        return self.folder / f"{self.options.run.select}.pt"

    def result(self) -> dict[str, Any]:
        """The contents of result.json."""
        return self.report("result")

    def report(self, name: str) -> dict[str, Any]:
        """The contents of the JSON file of that name; UserError when it cannot be read."""
        path = self.folder / f"{name}.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it, and run again") from error
        return content

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def _finished(self) -> bool:
        if not (self.folder / "result.json").exists():
            return False
        # An option that the training's version did not have is at its default.
        trained = parsing.parse_config(self.result()["config"], f"{self.folder / 'result.json'}")
        changed = parsing.differences(*map(_result_relevant, (trained, self.options)))
        if changed:
            raise UserError(
                f"{self.folder} holds a training with other options ({'; '.join(changed)}): choose "
                "another folder by --runs, or remove it"
            )
        return True


def _result_relevant(options: Options) -> dict[str, Any]:
    return result_relevant(options.config())
