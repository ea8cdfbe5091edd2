"""A case measured: what is checked and timed, and the sentences that follow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mmixer_kernels.comparison import Case, WrongResult, compare, measure, passes
from mmixer_kernels.comparison.measure import AGAIN, AT_ONCE, EAGER, GRU, IN_TURN, LSTM, ONE_STEP
from mmixer_kernels.comparison.timing import WARMING, Contender, Times
from mmixer_kernels.engines import cpu

CASE = Case(4, 2, 8, 6, 5, engine="cpu")
UNITS = ["FusedMCU", AGAIN, EAGER, GRU, LSTM]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the contenders of each comparison, whose calls are made and not timed."""
    seen: list[list[str]] = []

    def interleave(contenders: Sequence[Contender], budget: float, warming: float) -> Times:
        assert warming == WARMING  # else a short call pays for the caches of the one before it
        for contender in contenders:
            contender.call()
        seen.append([x.name for x in contenders])
        return {x.name: [2.0 + i] * 5 for i, x in enumerate(contenders)}

    monkeypatch.setattr(measure, "interleave", interleave)
    return seen


def test_everything_takes_turns_and_waits_for_the_device(
    rounds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronised(contender: Contender, device: torch.device) -> Contender:
        assert device == CASE.device
        return contender._replace(name=contender.name + "!")

    monkeypatch.setattr(measure, "synchronised", synchronised)
    missing: dict[str, str] = {}
    for pass_ in passes.PASSES:
        measure._times(CASE, measure._calls(CASE), pass_, 0, missing)
    rest = [ONE_STEP, IN_TURN, AT_ONCE]
    assert rounds[0] == [f"{x}!" for x in [*UNITS[:1], *UNITS[2:], *rest]]
    assert rounds[1] == [f"{x}!" for x in [*UNITS, *rest]]
    assert missing == {}


def test_the_report_has_an_answer_to_each_question(
    rounds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compare(CASE)
    assert len(rounds) == 3
    assert list(report) == [
        *("case", "machine", "engine", "check", "rounds", "seconds", "ratios", "missing"),
        *("saved_bytes", "limits", "recurrent_weights", "memories", "alternatives", "settings"),
        "advice",
    ]
    assert report["check"]["error"] < report["check"]["tolerance"] == 1e-4
    assert report["check"]["steps"] == 4
    assert list(report["ratios"]["forward"]) == [EAGER, GRU, LSTM]
    assert report["ratios"]["forward + backward"][AGAIN]["of_medians"] == pytest.approx(2 / 3)
    assert report["saved_bytes"]["FusedMCU"] == 4 * cpu.saved_size(CASE.problem, "gates")
    assert list(report["saved_bytes"]) == UNITS
    assert report["recurrent_weights"] == 3 * 8 * 8 * 4
    assert report["alternatives"]["B = 4"]["of_medians"] == pytest.approx(3 / 2 / 2)
    assert not any("recompute" in x for x in report["advice"])
    monkeypatch.setattr(measure, "WORTH_BYTES", 1)
    assert any(x.startswith("recompute=True keeps") for x in compare(CASE)["advice"])


def test_a_script_s_random_numbers_stay(rounds: list[list[str]]) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    compare(Case(2, 2, 8))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_script_s_modes_do_not_count(rounds: list[list[str]], mode: Any) -> None:
    with mode():
        report = compare(Case(2, 2, 8))
    assert report["check"]["error"] < 1e-5
    assert report["saved_bytes"]["FusedMCU"] > 0


def test_a_forward_alone(rounds: list[list[str]]) -> None:
    report = compare(Case(1, 2, 8, context_size=0), backward=False)
    assert list(report["seconds"]) == ["forward"]
    assert ONE_STEP not in report["seconds"]["forward"]
    assert report["saved_bytes"] == {}


def test_an_engine_that_is_wrong_is_not_timed(
    rounds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu._forward

    def wrong(packed, call, tensors):  # type: ignore[no-untyped-def]
        output, *others = right(packed, call, tensors)
        return output.mul_(1.001), *others

    monkeypatch.setattr(cpu, "_forward", wrong)
    with pytest.raises(WrongResult, match="output 0"):
        compare(CASE)
    assert rounds == []


def test_a_baseline_that_does_not_run_is_told(
    rounds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel\n for this")

    monkeypatch.setattr(torch.nn.GRU, "forward", fails)
    report = compare(CASE)
    assert report["missing"] == {f"{GRU}, {x}": "no kernel for this" for x in passes.PASSES}
    assert GRU not in report["seconds"]["forward"]
    assert GRU not in report["saved_bytes"]


def test_a_long_sequence_is_checked_as_far_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert measure._checked_steps(Case(64, 8, 512)) == 64
    assert measure._checked_steps(Case(10_000, 64, 1024)) < 200
    monkeypatch.setattr(measure, "CHECKED", 1)
    assert measure._checked_steps(CASE) == 1


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ({IN_TURN: 0.4, AT_ONCE: 0.2, ONE_STEP: 0.6}, "fixed cost, about 56% of its time"),
        ({IN_TURN: 0.2, AT_ONCE: 0.2, ONE_STEP: 0.1}, "but the matrix products"),
        ({IN_TURN: 0.2, AT_ONCE: 0.2}, "for all products torch.mm takes 40%"),
        ({IN_TURN: 0.2, AT_ONCE: 0.4}, "for one step: for these alone torch.mm takes 60%"),
        ({IN_TURN: 0.61, AT_ONCE: 0.2, ONE_STEP: 0.1}, "recurrent products"),
        ({IN_TURN: 0.2, AT_ONCE: 0.61, ONE_STEP: 0.1}, "all steps at once"),
    ],
)
def test_the_largest_part_is_the_limit(shares: dict[str, float], named: str) -> None:
    assert named in measure.limit(shares, 10)


def test_two_steps_of_equal_length_have_no_fixed_cost() -> None:
    """A call of one step takes half the time of two where nothing is fixed, else more."""
    shares = {IN_TURN: 0.7, AT_ONCE: 0.2}
    assert "recurrent products" in measure.limit(shares | {ONE_STEP: 0.55}, 2)
    assert "fixed cost, about 100%" in measure.limit(shares | {ONE_STEP: 1.1}, 2)


def test_recompute_is_advice_where_it_keeps_less() -> None:
    seconds = {"FusedMCU": 2.0, AGAIN: 3.0}
    assert measure.memory_advice({"FusedMCU": 2**20, AGAIN: 1}, seconds) == []
    assert measure.memory_advice({"FusedMCU": 2**22}, seconds) == []
    (sentence,) = measure.memory_advice({"FusedMCU": 6_000_000, AGAIN: 1_000_000}, seconds)
    assert sentence.startswith(
        "recompute=True keeps 1 MB for backward in place of 6, and takes 1.5"
    )


def test_a_short_measurement_of_everything() -> None:
    times = functools.partial(compare, Case(2, 2, 8), 0.01)()["seconds"]
    assert all(x > 0 for pass_ in times.values() for x in pass_.values())
