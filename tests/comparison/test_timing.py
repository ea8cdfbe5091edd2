"""The order of turns, and the ratios with their intervals."""

import math
import random
import time

import pytest

from mmixer_kernels.comparison import timing
from mmixer_kernels.comparison.timing import Contender, Ratio


def test_every_second_round_has_the_opposite_order():
    order = []
    contenders = [Contender(name, lambda name=name: name) for name in "ABC"]

    def clock(call):
        order.append(call())
        return float(len(order))

    times = timing.interleave(contenders, 0, clock)
    rounds = "".join(order)[-15:]  # what comes before are the estimates
    assert rounds == "ABCCBAABCCBAABC"
    assert [len(x) for x in times.values()] == [5, 5, 5]
    # each time is its contender's own
    assert all(order[int(x) - 1] == name for name, rounds in times.items() for x in rounds)


def test_a_short_call_is_warmed_for_its_time(monkeypatch):
    now, calls = [0.0], []

    def takes(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return Contender(name, call)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turns = timing.Turns([takes("short", 0.008), takes("long", 0.03)], 0.5, warming=0.02)
    assert turns.rounds == 8  # of 58 ms
    calls.clear()
    turns.take_baselines()
    assert calls == ["long", "short", "short", "short"]
    assert turns.times == {"short": [], "long": pytest.approx([0.03])}


def test_the_interval_is_that_of_the_medians():
    """The median's exact 95 % interval of 101 values 0...100 is from the 41st to the 61st."""
    ours = [float(x) for x in range(101)]
    random.Random(0).shuffle(ours)
    ratio = timing.ratio(ours, [10.0] * 101)
    assert ratio.of_medians == 5
    assert 3.8 <= ratio.low <= 4.2
    assert 5.8 <= ratio.high <= 6.2
    assert timing.ratio(ours, [10.0] * 101) == ratio
    assert str(Ratio(1.234, 1.0, 2.0)) == "1.23 (1.00-2.00)"


def test_the_interval_draws_whole_rounds():
    """A delay that slows both contenders of a round alike says nothing of their ratio."""
    generator = random.Random(0)
    baseline = [math.exp(generator.gauss(0, 2)) for _ in range(51)]
    ratio = timing.ratio([2 * x for x in baseline], baseline)
    assert ratio == pytest.approx((2, 2, 2))


def test_a_ratio_needs_equal_rounds():
    with pytest.raises(ValueError, match="zip"):
        timing.ratio([1.0, 2.0], [1.0])
