"""A fair comparison of units: the options of each are chosen from one grid, with one budget, by
the people that a fold trains on, and those that it tests are seen by the final trainings alone.

Within a fold, each candidate of each network is trained twice, for half the epochs: on one half of
the fold's training people and tested on the other half, and the other way round. The candidate with
the best mean accuracy (of equals the first of the grid) is then trained on all of them, with every
seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import mean

from ..errors import UserError
from . import ablations
from .networks import GRU, LSTM, M_MIXER, NO_CONTEXT, Network
from .results import Report, Results
from .runs import Plan, Run

COMPARED = (LSTM, GRU, NO_CONTEXT, M_MIXER)
GRIDS: dict[str, dict[str, tuple[str, ...]]] = {
    "watch": {"--optimizer.learning-rate": ("4e-3", "2e-3"), "--stride": ("4", "2")}
}
"""The values of options to choose from, by data set; every network has the same."""
SEED = 0
"""The seed of the trainings that choose."""


def candidates(plan: Plan) -> list[Run]:
    """The trainings that the choices need, within every fold's training people.

    Raises:
        UserError: the data set has no grid, or there are no folds.
    """
    return [
        run
        for fold in range(len(_checked(plan).folds))
        for network in COMPARED
        for options in _grid(plan)
        for run in _trainings(plan, fold, network, options)
    ]


def networks(plan: Plan) -> list[Network]:
    """The networks with the options that were chosen for each fold; `candidates` are trained."""
    return [
        Network(f"nested-{network.name}", network.label, network.options, _chosen(plan, network))
        for network in COMPARED
    ]


def report(results: Results, networks: Sequence[Network]) -> Report:
    """The table of the networks, what was chosen for each fold, and what the choices were by."""
    plan = results.plan
    made = ablations.compare(
        results, networks, {"nested-m-mixer": "MCU"}, "unit", {}, {"nested-lstm", "nested-gru"}
    )
    chosen = [["unit", *(f"fold {fold}" for fold in range(len(plan.folds)))]]
    for network in networks:
        values = [" ".join(options[1::2]) for options in network.by_fold]
        chosen.append([network.label, *values])
    searched = candidates(plan)
    names = ", ".join(name.lstrip("-") for name in GRIDS[plan.base.run.data])
    minutes = sum(run.report("run")["seconds"] for run in searched) / 60
    made.tables.append(chosen)
    made.notes.append(
        f"The second table has the {names} that were chosen, of {len(_grid(plan))} candidates, by "
        "the mean accuracy on either half of the fold's training people after training on the "
        f"other for half the epochs. The choices took {len(searched)} trainings, {minutes:.1f} "
        "minutes added up."
    )
    made.numbers["candidates"] = {
        network.label: [
            {" ".join(options): _accuracy(plan, fold, network, options) for options in _grid(plan)}
            for fold in range(len(plan.folds))
        ]
        for network in COMPARED
    }
    return made


def _checked(plan: Plan) -> Plan:
    data = plan.base.run.data
    if data not in GRIDS:
        raise UserError(
            f"nested needs a data set with a grid, {', '.join(GRIDS)}, but --data is {data}"
        )
    if not plan.folds:
        raise UserError("nested chooses within folds: pass --folds")
    return plan


def _grid(plan: Plan) -> list[tuple[str, ...]]:
    """The candidates: options and values, one after another."""
    grid = GRIDS[plan.base.run.data]
    values = itertools.product(*grid.values())
    return [
        tuple(word for pair in zip(grid, chosen, strict=True) for word in pair) for chosen in values
    ]


def _chosen(plan: Plan, network: Network) -> tuple[tuple[str, ...], ...]:
    """The best candidate of each fold; of equals the first."""
    grid = _grid(plan)
    found = (
        [_accuracy(plan, fold, network, options) for options in grid]
        for fold in range(len(plan.folds))
    )
    return tuple(grid[accuracies.index(max(accuracies))] for accuracies in found)


def _accuracy(plan: Plan, fold: int, network: Network, options: tuple[str, ...]) -> float:
    runs = _trainings(plan, fold, network, options)
    return mean(run.result()["accuracy"] for run in runs)


def _trainings(plan: Plan, fold: int, network: Network, options: tuple[str, ...]) -> list[Run]:
    """A candidate's trainings within a fold's training people."""
    epochs = str(max(1, plan.base.run.epochs // 2))
    inner = Plan(
        (*plan.arguments, "--epochs", epochs, "--no-plots"),
        plan.folder / "nested" / f"fold-{fold}",
        (SEED,),
        _halves(plan, fold),
    )
    name = f"{network.name}-{'-'.join(word.lstrip('-') for word in options)}"
    return inner.runs(Network(name, network.label, (*network.options, *options)))


def _halves(plan: Plan, fold: int) -> tuple[tuple[str, ...], ...]:
    """The division of a fold's training people in two, by the other folds in turns: options that
    test one half, train on the other and leave out those that the fold tests."""
    tested = [_tested(options) for options in plan.folds]
    others = tested[:fold] + tested[fold + 1 :]
    return tuple(
        (
            "--test-subjects",
            *(person for people in others[half::2] for person in people),
            "--exclude-subjects",
            *tested[fold],
            "--validation-subject",
            "None",
        )
        for half in (0, 1)
    )


def _tested(options: Sequence[str]) -> tuple[str, ...]:
    """The people after --test-subjects."""
    rest = options[options.index("--test-subjects") + 1 :]
    return tuple(itertools.takewhile(str.isdigit, rest))
