"""Some experiments on one data set: from options to trainings to reports."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch

from .. import provenance
from ..atomic import replacing
from ..command import processors
from ..errors import UserError
from . import report, schedule
from .catalogue import EXPERIMENTS
from .results import Results
from .runs import FOLDS, Plan, Run

T = TypeVar("T")


@dataclass(frozen=True)
class Study:
    """Experiments whose trainings share seeds, options and a folder.

    Args:
        names: names of experiments.
        arguments: arguments of every training.
        jobs, output, runs: as the command's options.
        skip_impossible: leave out experiments that do not go with the data set, and say so;
            otherwise they are a mistake.
        command_line: the command's arguments without names, for the record.
    """

    names: tuple[str, ...]
    arguments: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: bool
    jobs: int | None
    output: Path | None
    runs: Path | None
    skip_impossible: bool
    command_line: tuple[str, ...]

    @cached_property
    def plan(self) -> Plan:
        """The trainings' common part; UserError where an option is out of its range."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(
                "--seeds must be one or more, each once and 0 or more, but are "
                f"{' '.join(map(str, self.seeds)) or 'none'}"
            )
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs must be 1 or more, but is {self.jobs}")
        data = Plan(self.arguments, Path(), ()).base.run.data
        if self.folds and data not in FOLDS:
            raise UserError(
                f"--folds needs a data set with folds, {', '.join(FOLDS)}, but --data is {data}"
            )
        folds = FOLDS[data] if self.folds else ()
        return Plan(self.arguments, self.runs or self.folder / "runs", self.seeds, folds)

    @cached_property
    def folder(self) -> Path:
        """The folder of the reports."""
        if self.output is not None:
            return self.output
        return Path("experiments") / Plan(self.arguments, Path(), ()).base.run.data

    def run(self) -> list[schedule.Failure]:
        """Trains what is missing, and reports every experiment whose trainings are complete.

        Raises:
            UserError: an option, or a folder with trainings of other options; nothing has been
                trained then.
        """
        before = self._of_each(self.names, lambda name: EXPERIMENTS[name].before(self.plan))
        failures = self._train([(run, ()) for runs in before.values() for run in runs])
        if failures:
            return failures
        networks = self._of_each(before, lambda name: EXPERIMENTS[name].networks(self.plan))
        failures = self._train(
            [
                (run, EXPERIMENTS[name].measures)
                for name, chosen in networks.items()
                for network in chosen
                for run in self.plan.runs(network)
            ]
        )
        failed = {failure.task.log for failure in failures}
        results = Results(self.plan)
        for name, chosen in networks.items():
            incomplete = [run for n in chosen for run in results.runs(n) if _log(run) in failed]
            if incomplete:
                print(f"{name}: not reported, {len(incomplete)} trainings failed", file=sys.stderr)
                continue
            made = EXPERIMENTS[name].report(results, chosen)
            report.write(self.folder, name, results, chosen, made, self.command_line)
            print(f"{name}: reported", file=sys.stderr)
        return failures

    def _of_each(self, names: Iterable[str], ask: Callable[[str], T]) -> dict[str, T]:
        """The answers of those experiments that go with the data set."""
        answers = {}
        for name in names:
            try:
                answers[name] = ask(name)
            except UserError as error:
                if not self.skip_impossible:
                    raise
                print(f"{name}: left out: {error}", file=sys.stderr)
        return answers

    def _train(self, wanted: Sequence[tuple[Run, Sequence[str]]]) -> list[schedule.Failure]:
        """Does what trainings still need, each with its measures, and gives those that failed."""
        tasks = _tasks(wanted)
        if not tasks:
            return []
        gpus = _gpus(self.plan.base.run.device)
        jobs = self.jobs or (len(gpus) if gpus else processors())
        print(f"{len(tasks)} trainings to do, {jobs} at a time", file=sys.stderr)
        return schedule.run(tasks, min(jobs, len(tasks)), gpus)


def _tasks(wanted: Sequence[tuple[Run, Sequence[str]]]) -> list[schedule.Task]:
    """The tasks that the trainings still need, each training once."""
    needed: dict[Path, tuple[Run, list[str]]] = {}
    for run, measures in wanted:
        known = needed.setdefault(run.folder, (run, []))[1]
        known += [measure for measure in measures if measure not in known]
    tasks = []
    for run, known in needed.values():
        commands = run.needs(known)
        if commands:
            work, done = run.options.run.epochs, run.epochs_done
            ended = partial(_record, run.folder / "run.json")
            tasks.append(schedule.Task(str(run), commands, _log(run), work, done, ended))
    return tasks


def _log(run: Run) -> Path:
    return run.folder / "log.txt"


def _record(path: Path, seconds: float) -> None:
    """Adds to the time that a training has taken, with the commit that it ended with."""
    before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    with replacing(path) as file:
        spent = {"seconds": before + seconds, "commit": provenance.commit()}
        file.write(json.dumps(spent).encode())


def _gpus(device: str) -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES for one training each."""
    if device != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
