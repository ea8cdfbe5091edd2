"""`python -m mmixer_kernels.compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mmixer_kernels import compare
from mmixer_kernels.comparison import Case, WrongResult, describe, text
from mmixer_kernels.comparison.measure import compare as measured


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return measured(Case(2, 2, 8, 6, 5), 0.01)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]) -> list[Any]:
    """The calls of `comparison.compare` that the command makes."""
    seen: list[Any] = []

    def compare_case(case: Case, budget: float, *, backward: bool) -> dict[str, Any]:
        seen.append((case, budget, backward))
        return report

    monkeypatch.setattr(compare, "compare", compare_case)
    return seen


def test_the_options_make_the_case(cases: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--steps 3 --batch 2 --hidden 16 --input-size 5 --context-size 0"
    others = "--dtype float64 --device cpu --engine cpu --threads 1 --budget 2 --forward-only"
    assert compare.main([*shape.split(), *others.split()]) == 0
    assert cases == [(Case(3, 2, 16, 5, 0, torch.float64, torch.device("cpu"), "cpu"), 2.0, False)]
    assert torch.get_num_threads() == 1
    assert compare.main(["--hidden", "16", "--device", "cpu"]) == 0
    case, budget, backward = cases[1]
    assert (case.F, case.C, case.steps, case.batch, budget, backward) == (16, 16, 64, 8, 10, True)


def test_json_is_the_report(
    cases: list[Any], report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert compare.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == describe(report) + "\n"


def test_wrong_results_are_an_exit_code_and_no_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise WrongResult("output 0 is wrong")

    monkeypatch.setattr(compare, "compare", wrong)
    assert compare.main(["--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing was timed: output 0 is wrong" in err


@pytest.mark.parametrize("size", [["--hidden", "4000000"], ["--batch", "4000000000000"]])
def test_too_little_memory_is_one_line(size: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--device", "cpu", "--steps", "2", "--hidden", "16", *size]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory does not suffice for this shape: ")


def test_other_errors_are_faults_and_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(compare, "compare", broken)
    with pytest.raises(RuntimeError, match="broken"):
        compare.main(["--device", "cpu"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "steps must be"),
        ("--threads", "0", "--threads must be 1 to "),
        ("--threads", "1000000", "on this machine, but is 1000000"),
        ("--budget", "0", "--budget must be more than 0"),
        ("--engine", "fast", "engine must be one of"),
        ("--engine", "cuda", "does not take this call"),
        ("--device", "meta", "device must be cpu or cuda"),
        ("--device", "nowhere", "--device nowhere cannot be used here"),
    ],
)
def test_mistakes_of_the_user(
    cases: list[Any], capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    arguments = ["--device", "cpu"] if option != "--device" else []
    assert compare.main([*arguments, option, value]) == 2
    assert message in capsys.readouterr().err
    assert cases == []


def test_the_text_answers_each_question(report: dict[str, Any]) -> None:
    shown = describe(report)
    for part in (
        "T = 2, B = 2, H = 8, input 6, context 5, float32, on cpu",
        f"engine cpu: {report['engine']['why']}",
        "checked against float64: the largest relative error",
        "nn.LSTM",
        "FusedMCU, recompute=True",
        "what limits it",
        "recurrent weights 768 B, which each step reads",
        "PrepackedMCU",
        "T = 1: FusedMCU's time for a call of one step",
    ):
        assert part in shown
    sentences = [x for x in shown.splitlines() if "ms" not in x and "FusedMCU" not in x]
    assert max(map(len, sentences)) <= text.WIDTH + 10


@pytest.mark.parametrize("steps", [1, 2])
def test_a_forward_alone_has_a_text_too(steps: int) -> None:
    shown = describe(measured(Case(steps, 2, 8, 6, 5), 0.01, backward=False))
    table = shown.split("\n\n")[3]
    assert "nn.LSTM" in table
    assert "kept" not in shown
    assert "backward, ms" not in shown


def test_a_busy_machine_is_a_warning(report: dict[str, Any]) -> None:
    def shown(load: float | None) -> str:
        return describe(report | {"machine": report["machine"] | {"load": load, "processors": 4}})

    assert "warning: the machine was busy before (load 2.1 on 4 processors)" in shown(2.1)
    assert "warning" not in shown(1.9)
    assert "warning" not in shown(None)


def test_what_was_not_checked_or_did_not_run_is_told(report: dict[str, Any]) -> None:
    check = report["check"] | {"steps": 1}
    shown = describe(report | {"check": check, "missing": {"nn.GRU, forward": "no kernel"}})
    assert "checked against float64, its first 1 steps:" in shown
    assert "no nn.GRU, forward: no kernel" in shown


@pytest.mark.parametrize(
    ("size", "memories", "told"),
    [
        (100, {"L1": 200, "L2": 2000}, "the first that holds them is L1 (L1 200 B, L2 1.95 KiB)"),
        (1000, {"L1": 200, "L2": 2000}, "holds them is L2"),
        (10_000, {"L1": 200, "L2": 2000}, "holds them is the main memory"),
        (100, {}, "the sizes of the caches are not known here"),
    ],
)
def test_the_weights_beside_the_caches(size: int, memories: dict[str, int], told: str) -> None:
    assert told in text._weights(size, memories)
