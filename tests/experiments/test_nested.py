"""The nested comparison: who is seen by which training, and which candidate is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmixer_kernels.errors import UserError
from mmixer_kernels.experiments import nested
from mmixer_kernels.experiments.__main__ import main
from mmixer_kernels.experiments.networks import GRU, M_MIXER
from mmixer_kernels.experiments.runs import FOLDS, Plan
from mmixer_kernels.experiments.study import Study

SMALL = ("--data", "watch", "--epochs", "2", "--samples", "32", "--model.hidden-size", "8")


def plan(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Plan:
    return Plan(SMALL, folder, seeds, FOLDS["watch"])


def people(split: object) -> set[int]:
    return {recording.subject for recording in split.recordings}  # type: ignore[attr-defined]


def test_no_choice_sees_the_people_that_its_fold_tests(tmp_path: Path) -> None:
    searched = nested.candidates(plan(tmp_path))
    assert len({run.folder for run in searched}) == len(searched) == 5 * 4 * 4 * 2
    for fold in range(5):
        outer = {2 * fold + 1, 2 * fold + 2}
        halves = [
            run
            for run in searched
            if run.folder.is_relative_to(tmp_path / "nested" / f"fold-{fold}")
        ]
        tested = []
        for run in halves[:2]:  # those of one candidate, and the others differ in options alone
            data = run.options.data.load(None, 0)
            tested.append(people(data.test))
            assert people(data.train) | tested[-1] | outer == set(range(1, 11))
            assert not people(data.train) & tested[-1]
            assert not (people(data.train) | tested[-1]) & outer
        assert tested[0].isdisjoint(tested[1])
        assert len(tested[0]) == len(tested[1]) == 4
        divisions = {tuple(run.plan.folds[run.fold]) for run in halves}  # type: ignore[index]
        assert len(divisions) == 2


def test_every_network_has_the_same_candidates_and_the_same_budget(tmp_path: Path) -> None:
    searched = nested.candidates(plan(tmp_path))
    given: dict[str, list[tuple[str, ...]]] = {network.name: [] for network in nested.COMPARED}
    for run in searched:
        name = next(n for n in given if run.network.name.startswith(f"{n}-"))
        unit = next(n for n in nested.COMPARED if n.name == name).options
        assert run.network.options[: len(unit)] == unit
        given[name].append(run.network.options[len(unit) :])
        assert run.seed == nested.SEED
        assert run.arguments[run.arguments.index("--no-plots") - 2 :][:2] == ["--epochs", "1"]
    assert len({tuple(options) for options in given.values()}) == 1
    values = {(rate, stride) for _, rate, _, stride in given["m-mixer"]}
    assert values == {("4e-3", "4"), ("4e-3", "2"), ("2e-3", "4"), ("2e-3", "2")}


def test_the_best_mean_is_chosen_and_of_equals_the_first(tmp_path: Path) -> None:
    chosen = plan(tmp_path)
    for run in nested.candidates(chosen):
        better = run.network.name.startswith("gru") and run.network.name.endswith("stride-2")
        half = (0.1, -0.1)[run.fold or 0]  # one half alone would choose another
        result = {"accuracy": 0.5 + half + 0.01 * better}
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text(json.dumps(result))
    networks = {network.name: network for network in nested.networks(chosen)}
    first = ("--optimizer.learning-rate", "4e-3", "--stride", "4")
    assert networks["nested-m-mixer"].by_fold == (first,) * 5
    assert networks["nested-gru"].by_fold == ((*first[:-1], "2"),) * 5
    final = chosen.runs(networks["nested-gru"])[1]
    assert (final.seed, final.fold) == (0, 1)
    assert final.options.data.stride == 2  # type: ignore[attr-defined]
    assert final.options.data.test_subjects == (3, 4)  # type: ignore[attr-defined]
    assert final.options.data.exclude_subjects is None  # type: ignore[attr-defined]
    assert final.options.run.epochs == 2


def test_it_needs_folds_and_a_grid() -> None:
    with pytest.raises(UserError, match="pass --folds"):
        nested.candidates(Plan(SMALL, Path("runs"), (0,)))
    with pytest.raises(UserError, match="a grid, watch, but --data is synthetic"):
        nested.candidates(Plan(("--data", "synthetic"), Path("runs"), (0,), ((),)))


@pytest.mark.parametrize("data", ["synthetic", "watch"])  # no grid, and no folds
def test_beside_all_it_is_left_out_where_it_cannot_be(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[object] = []
    monkeypatch.setattr(Study, "_train", lambda _, wanted: trained.extend(wanted) or [])
    arguments = ("--data", data)
    assert Study(("nested",), arguments, (0,), False, 1, tmp_path, None, True, ()).run() == []
    assert capsys.readouterr().err.count("nested: left out") == 1
    assert not trained


@pytest.mark.slow
def test_the_command_chooses_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nested, "COMPARED", (GRU, M_MIXER))
    monkeypatch.setitem(nested.GRIDS, "watch", {"--stride": ("8", "4")})
    arguments = ["nested", *SMALL, "--folds", "--seeds", "0", "--output", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "nested.json").read_text())
    assert len(found["trainings"]) == 2 * 5
    for network in found["networks"]:
        label = network["label"]
        accuracies = found["numbers"]["candidates"][label]
        for options, of_candidates in zip(network["by fold"], accuracies, strict=True):
            assert of_candidates[" ".join(options)] == max(of_candidates.values())
    assert "The choices took 40 trainings" in (tmp_path / "README.md").read_text()
    assert not list((tmp_path / "runs" / "nested").rglob("*.png"))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("result.json")}
    assert main(arguments) == 0
    assert before == {path: path.stat().st_mtime for path in tmp_path.rglob("result.json")}
