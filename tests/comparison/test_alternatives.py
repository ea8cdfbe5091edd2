"""Other ways to make a call: which there are, and which are advice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mmixer_kernels.comparison import alternatives, machine
from mmixer_kernels.comparison.case import Case
from mmixer_kernels.comparison.checking import WrongResult
from mmixer_kernels.comparison.timing import Ratio


@pytest.fixture(autouse=True)
def _one_thread_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MMIXER_ENGINE", raising=False)
    monkeypatch.setattr(alternatives, "processors", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(case: Case) -> list[str]:
    return [x.name for x in alternatives.all_of(case)]


def test_a_case_has_the_alternatives_that_there_are_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ["B = 4", "2 threads", "bfloat16 weights", "PrepackedMCU"]
    assert names(Case(3, 2, 8)) == usual
    assert names(Case(1, 2, 8)) == [*usual[:3], "T = 16", "CellStream"]
    assert names(Case(3, 2, 8, dtype=torch.float64)) == [*usual[:2], "float32", "PrepackedMCU"]
    assert names(Case(3, 2, 8, dtype=torch.bfloat16)) == [*usual[:2], "float32", "PrepackedMCU"]
    assert names(Case(3, 2, 8, engine="reference"))[1] == 'engine="cpu"'
    monkeypatch.setenv("MMIXER_ENGINE", "reference")
    assert names(Case(3, 2, 8))[1] == 'engine="cpu"'
    torch.set_num_threads(3)
    assert names(Case(3, 2, 8))[2:4] == ["1 thread", "2 threads"]


def test_one_with_more_work_is_worth_several_calls() -> None:
    case = Case(1, 2, 8)
    worth = {x.name: x.calls for x in alternatives.all_of(case)}
    assert {name: calls for name, calls in worth.items() if calls > 1} == {"B = 4": 2, "T = 16": 16}
    for alternative in alternatives.all_of(case):
        assert alternative.call().shape[:2].numel() == 2 * alternative.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("context_size", [0, 5])
def test_each_gives_the_case_s_results(dtype: torch.dtype, steps: int, context_size: int) -> None:
    case = Case(steps, 2, 8, 4, context_size, dtype, engine="reference")
    for alternative in alternatives.all_of(case):
        alternative.check()
    assert torch.get_num_threads() == 1


def test_a_wrong_one_is_refused() -> None:
    first, *_ = alternatives.all_of(Case(3, 2, 8))
    with pytest.raises(WrongResult, match="B = 4"):
        first._replace(call=lambda: 1.001 * case_output(first)).check()


def case_output(alternative: alternatives.Alternative) -> torch.Tensor:
    return alternative.call()


def test_advice_is_what_is_faster_beyond_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = alternatives.all_of(Case(3, 2, 8, engine="reference"))
    assert machine.faster_engine(Case(3, 2, 8, engine="reference")) == "cpu"
    unsure, sure = Ratio(0.7, 0.5, 0.96), Ratio(0.7, 0.6, 0.94)
    ratios = {x.name: unsure for x in found}
    assert alternatives.advice(found, ratios) == []
    expected = {
        "B = 4": "a batch of 4 takes 0.70 of the time per sample of one of 2",
        'engine="cpu"': 'the engine "cpu", which runs here too, takes 0.70 of the time: leave '
        'engine at "auto"',
        "2 threads": "2 threads take 0.70 of the time of 1, which OMP_NUM_THREADS=1 asks for: "
        "there are 2 processors",
    }
    for name, sentence in expected.items():
        assert alternatives.advice(found, ratios | {name: sure}) == [sentence]
