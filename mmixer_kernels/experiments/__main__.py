"""`python -m mmixer_kernels.experiments NAME...`: the paper's tables and figures on a data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from .. import command
from ..errors import UserError
from . import study
from .catalogue import EXPERIMENTS
from .runs import PROG


@dataclass(frozen=True)
class ExperimentOptions:
    """Trains the networks of the paper's experiments, as many at a time as the machine has
    processors (or GPUs), and writes each experiment's table, picture and numbers. What is trained
    already is not trained again, and what was interrupted goes on.

    Any further option goes to every training: --data and its options, --root, --config, --epochs,
    --device, --optimizer.*, --loader.* (python -m mmixer_kernels.train --help)."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Experiments, or all of those that the data set has: table1, table2, table3, table4,
    tables5-7, figure4, figure5, engines, missing, modalities, init, quantized, length. All is
    without nested, which chooses each network's options by trainings of its own, with --folds."""
    data: str | None = None
    """Data set; when None, the one of --config, or synthetic."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that every network is trained with."""
    folds: bool = False
    """Train every network on each fold of the data set's cross-validation (watch: five, by
    subject)."""
    jobs: int | None = None
    """Trainings side by side; when None, one per processor, or one per GPU for --device cuda."""
    output: Path | None = None
    """Folder for tables and pictures; when None, experiments/DATA."""
    runs: Path | None = None
    """Folder for the trainings; when None, runs in --output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, 1 when trainings failed, 2 after a mistake of the user, 130
    after Ctrl-C."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    options, rest = tyro.cli(
        ExperimentOptions, prog=PROG, args=list(arguments), return_unknown_args=True
    )
    if tuple(arguments[: len(options.names)]) != options.names:
        raise UserError("NAME comes first, before all options")
    unknown = [name for name in options.names if name not in (*EXPERIMENTS, "all")]
    if unknown or not options.names:
        raise UserError(
            f"NAME must be of {', '.join(EXPERIMENTS)}, or all, but is "
            f"{', '.join(unknown) or 'missing'}"
        )
    data = [] if options.data is None else ["--data", options.data]
    chosen = study.Study(
        names=_chosen(options.names),
        arguments=(*data, *rest),
        seeds=options.seeds,
        folds=options.folds,
        jobs=options.jobs,
        output=options.output,
        runs=options.runs,
        skip_impossible="all" in options.names,
        command_line=tuple(arguments[len(options.names) :]),
    )
    failures = chosen.run()
    for failure in failures:
        print(f"failed: {failure.task.name}: {failure.reason} (see {failure.task.log})")
    print(f"tables and pictures are in {chosen.folder / 'README.md'}")
    return 1 if failures else 0


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The experiments of these names; many trainings come before those that all leaves out."""
    everything = [name for name in EXPERIMENTS if name != "nested"] if "all" in names else []
    return tuple(dict.fromkeys([*everything, *(name for name in names if name != "all")]))


if __name__ == "__main__":
    sys.exit(main())
