"""Benchmarks compare: a kernel is checked first, then timed in turns with its baselines.

Ours is what pytest-benchmark measures; the baselines take their turns in its `setup`, which is
called before each round and not timed. So `--benchmark-json` and its other options work, and every
round of it has a round of each baseline beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import clocks
import pytest
import report
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mmixer_kernels.command import processors
from mmixer_kernels.comparison import timing

COMPARISONS = pytest.StashKey[list[report.Comparison]]()
LOAD = pytest.StashKey[float]()
"""Load average of the last minute before the run: what others do here."""
FACTS = pytest.StashKey[dict[str, Any]]()
HEAD_START = 20_000_000
"""Cycles, some 10 ms, that the GPU sleeps while the host starts what is timed on it."""
THREADS = [1] if torch.cuda.is_available() else [1, 2]
"""A GPU's time is too dear to measure everything once for each number of the host's threads."""

Compare = Callable[..., "timing.Times | None"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("comparisons")
    group.addoption("--results", type=Path, metavar="FILE.json", help="write all ratios there")
    group.addoption(
        "--budget", type=float, default=3.0, metavar="SECONDS", help="for each comparison's rounds"
    )
    group.addoption(
        "--compile-limit",
        type=int,
        default=300,
        metavar="SECONDS",
        help="for a baseline that is compiled at its first call",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[COMPARISONS] = []
    config.stash[LOAD] = os.getloadavg()[0]


@pytest.fixture(scope="session", params=THREADS, ids=lambda n: f"{n}-thread{'s' * (n > 1)}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, which the CPU engine follows."""
    count: int = request.param
    available = processors()
    if count > available:
        pytest.skip(f"{count} threads need {count} processors, here are {available}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture
def compile_limit(request: pytest.FixtureRequest) -> int:
    limit: int = request.config.getoption("compile_limit")
    return limit


@pytest.fixture
def compare(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """Times contenders in turns and adds a row to the summary.

    `compare(table, case, contenders, threads=, error=)`: ours is first in contenders, error is the
    answer of the check that ours has passed, missing names baselines that did not run, and why,
    multiply_adds has each contender's, ours first, where the table is to have their ratios too.
    Returns the times, or None with --benchmark-disable.
    """

    def run(
        table: str,
        case: str,
        contenders: Sequence[timing.Contender],
        *,
        threads: int,
        error: float,
        shares: Callable[[timing.Times], dict[str, str]] | None = None,
        missing: dict[str, str] | None = None,
        multiply_adds: dict[str, float] | None = None,
    ) -> timing.Times | None:
        benchmark.group = table
        if benchmark.disabled:
            benchmark.pedantic(contenders[0].call)
            return None
        budget = request.config.getoption("budget")
        turns = timing.Turns(contenders, budget, warming=timing.WARMING)
        benchmark.pedantic(turns.ours.call, setup=turns.take_baselines, rounds=turns.rounds)
        assert benchmark.stats is not None  # pedantic has just filled it
        turns.times[turns.ours.name] = list(benchmark.stats.stats.data)
        comparison = report.Comparison(table, case, threads, error, turns.rounds)
        if shares is None:
            comparison.ratios = turns.ratios()
        else:
            comparison.shares = shares(turns.times)
        comparison.missing = missing or {}
        comparison.multiply_adds = multiply_adds or {}
        benchmark.extra_info.update(
            case=case,
            threads=threads,
            relative_error=error,
            ratios={name: ratio._asdict() for name, ratio in comparison.ratios.items()},
            shares=comparison.shares,
        )
        _record(request.config, comparison)
        return turns.times

    return run


@pytest.fixture
def compare_on_gpu(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """`compare` by CUDA events, in two ways: a call as its caller sees it, Python included, on an
    idle GPU ("call"), and of the contenders named in on_gpu, what it takes there ("GPU"). Of the
    first also the time until it returns is recorded ("host").

    pytest-benchmark's own rounds of ours, by the processor's clock, come last.
    """

    def run(
        table: str,
        case: str,
        contenders: Sequence[timing.Contender],
        *,
        error: float,
        settings: dict[str, Any],
        on_gpu: Sequence[str],
        missing: dict[str, str],
    ) -> None:
        config = request.config
        benchmark.group = table
        ours = contenders[0]
        if benchmark.disabled:
            benchmark.pedantic(ours.call)
            return
        budget = config.getoption("budget")
        calls = timing.interleave(contenders, budget, clocks.call_seconds)
        clock = partial(clocks.cuda_seconds, cycles=HEAD_START)
        alone = timing.interleave([x for x in contenders if x.name in on_gpu], budget, clock)
        benchmark.pedantic(timing.synchronised(ours, torch.device("cuda")).call, rounds=5)
        comparison = report.Comparison(
            table, case, torch.get_num_threads(), error, len(calls[ours.name])
        )
        comparison.ratios = {
            x.name: timing.ratio(calls[ours.name], calls[x.name]) for x in contenders[1:]
        }
        comparison.settings = {**settings, "ours": ours.name}
        comparison.seconds = {
            kind: {name: median(x) for name, x in times.items()}
            for kind, times in (("call", calls), ("GPU", alone))
        }
        comparison.seconds["host"] = clocks.host_seconds(calls)
        comparison.by_host = clocks.by_host(alone)
        comparison.missing = missing
        benchmark.extra_info.update(case=case, relative_error=error, seconds=comparison.seconds)
        _record(config, comparison)

    return run


@pytest.fixture
def compare_on_host(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """`compare` by the time of this process's processors, of one thread: `compare_on_host(table,
    case, contenders, error=, kernels=)`.

    kernels() is called after everything that is timed, and names what contenders would start on a
    GPU, and how often. pytest-benchmark's own rounds of ours come before it.
    """

    def run(
        table: str,
        case: str,
        contenders: Sequence[timing.Contender],
        *,
        error: float,
        kernels: Callable[[], dict[str, dict[str, int]]] = dict,
    ) -> None:
        config = request.config
        benchmark.group = table
        ours = contenders[0]
        if benchmark.disabled:
            benchmark.pedantic(ours.call)
            return
        budget = config.getoption("budget")
        times = timing.interleave(contenders, budget, clocks.processor_seconds)
        benchmark.pedantic(ours.call, rounds=5, iterations=clocks.CALLS)
        comparison = report.Comparison(table, case, 1, error, len(times[ours.name]))
        comparison.ratios = {
            x.name: timing.ratio(times[ours.name], times[x.name]) for x in contenders[1:]
        }
        comparison.settings = {"ours": ours.name}
        comparison.seconds = {"processor": {name: median(x) for name, x in times.items()}}
        comparison.kernels = kernels()
        comparison.shares = _started(comparison.kernels)
        benchmark.extra_info.update(case=case, relative_error=error, seconds=comparison.seconds)
        _record(config, comparison)

    return run


@pytest.fixture
def compare_slow_downs(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """How much longer contenders take beside other processes, each against itself:
    `compare_slow_downs(table, contenders, threads=, error=, beside=, clock=)`.

    beside names what is there in each row, first nothing; clock(contender, name) times a contender
    there. Every round has each contender in each row.
    """

    def run(
        table: str,
        contenders: Sequence[timing.Contender],
        *,
        threads: int,
        error: float,
        beside: Sequence[str],
        clock: Callable[[timing.Contender, str], float],
    ) -> None:
        benchmark.group = table
        if benchmark.disabled:
            benchmark.pedantic(contenders[0].call)
            return
        turns = [
            timing.Contender(f"{x.name}, {name}", partial(clock, x, name))
            for name in beside
            for x in contenders
        ]
        times = timing.interleave(turns, request.config.getoption("budget"), _answer)
        benchmark.pedantic(contenders[0].call, rounds=5)
        for name in beside:
            rows = {x.name: times[f"{x.name}, {name}"] for x in contenders}
            idle = {x.name: times[f"{x.name}, {beside[0]}"] for x in contenders}
            comparison = report.Comparison(
                table, name, threads, error, len(rows[contenders[0].name])
            )
            comparison.ratios = {x: timing.ratio(rows[x], idle[x]) for x in rows}
            comparison.seconds = {"call": {x: median(seconds) for x, seconds in rows.items()}}
            _record(request.config, comparison)

    return run


def _answer(call: Callable[[], object]) -> float:
    """A clock of calls that time themselves."""
    seconds = call()
    assert isinstance(seconds, float)
    return seconds


@pytest.fixture
def count_kernels(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """Adds what contenders start on the GPU, by torch's profiler: `count_kernels(table, case,
    contenders, settings=)`.

    By itself and after everything that is timed: no number is taken beside a profiler, and one that
    is refused, or ends the process, takes none with it.
    """

    def run(
        table: str,
        case: str,
        contenders: Sequence[timing.Contender],
        *,
        settings: dict[str, Any],
    ) -> None:
        benchmark.group = table
        benchmark.pedantic(contenders[0].call)
        if benchmark.disabled:
            return
        comparison = report.Comparison(table, case, torch.get_num_threads(), None, 1)
        comparison.settings = settings
        for contender in contenders:
            try:
                comparison.kernels[contender.name] = clocks.kernels(contender.call)
            except Exception as problem:
                comparison.missing[f"kernels of {contender.name}"] = clocks.reason(problem)
        comparison.shares = _started(comparison.kernels)
        _record(request.config, comparison)

    return run


def _started(kernels: dict[str, dict[str, int]]) -> dict[str, str]:
    """Columns of a table: how much each contender starts on the GPU."""
    return {f"started by {name}": str(sum(counts.values())) for name, counts in kernels.items()}


def _record(config: pytest.Config, comparison: report.Comparison) -> None:
    config.stash[COMPARISONS].append(comparison)
    _write(config, [])


def _write(config: pytest.Config, failed: Sequence[str]) -> Path | None:
    """The results so far, after each comparison: a run may be cut off. None: nobody wants them."""
    path: Path | None = config.getoption("results")
    if path is not None:
        if FACTS not in config.stash:
            try:
                config.stash[FACTS] = report.facts()
            except Exception as problem:  # what was measured is worth more
                config.stash[FACTS] = {"facts": f"no answer: {clocks.reason(problem)}"}
        comparisons = config.stash[COMPARISONS]
        report.write(path, config.stash[FACTS], comparisons, failed, config.stash[LOAD])
    return path


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    comparisons = config.stash[COMPARISONS]
    failed = [
        test.nodeid
        for outcome in ("failed", "error")
        for test in terminalreporter.stats.get(outcome, [])
    ]
    if comparisons:
        terminalreporter.section("ratios: our time / the baseline's, below 1 is faster")
        terminalreporter.write_line("of the medians (95 % bootstrap interval); case is TxBxH")
        load = f"{config.stash[LOAD]:.1f} on {processors()} processors"
        terminalreporter.write_line(f"load before the run: {load}\n")
        terminalreporter.write_line(report.tables(comparisons))
    if path := _write(config, failed):
        terminalreporter.write_line(f"\nwritten: {path}")
