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

import pytest
import report
import timing
import torch
from pytest_benchmark.fixture import BenchmarkFixture

COMPARISONS = pytest.StashKey[list[report.Comparison]]()
LOAD = pytest.StashKey[float]()
"""Load average of the last minute before the run: what others do here."""
FACTS = pytest.StashKey[dict[str, Any]]()
HEAD_START = 10_000_000
"""Cycles, some milliseconds, that the GPU sleeps while the host starts what is timed on it."""

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
        help="for a torch.compile of the eager reference",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[COMPARISONS] = []
    config.stash[LOAD] = os.getloadavg()[0]


@pytest.fixture(scope="session", params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, which the CPU engine follows."""
    count: int = request.param
    available = len(os.sched_getaffinity(0))
    if count > available:
        pytest.skip(f"{count} threads need {count} processors, here are {available}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """Times contenders in turns and adds a row to the summary.

    `compare(table, case, contenders, threads=, error=)`: ours is first in contenders, error is the
    answer of the check that ours has passed. Returns the times, or None with --benchmark-disable.
    """

    def run(
        table: str,
        case: str,
        contenders: Sequence[timing.Contender],
        *,
        threads: int,
        error: float,
        shares: Callable[[timing.Times], dict[str, str]] | None = None,
    ) -> timing.Times | None:
        benchmark.group = table
        if benchmark.disabled:
            benchmark.pedantic(contenders[0].call)
            return None
        turns = timing.Turns(contenders, request.config.getoption("budget"))
        benchmark.pedantic(turns.ours.call, setup=turns.take_baselines, rounds=turns.rounds)
        assert benchmark.stats is not None  # pedantic has just filled it
        turns.times[turns.ours.name] = list(benchmark.stats.stats.data)
        comparison = report.Comparison(table, case, threads, error, turns.rounds)
        if shares is None:
            comparison.ratios = turns.ratios()
        else:
            comparison.shares = shares(turns.times)
        benchmark.extra_info.update(
            case=case,
            threads=threads,
            relative_error=error,
            ratios={name: ratio._asdict() for name, ratio in comparison.ratios.items()},
            shares=comparison.shares,
        )
        request.config.stash[COMPARISONS].append(comparison)
        return turns.times

    return run


@pytest.fixture
def compare_on_gpu(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """`compare` by CUDA events, in two ways: a call as its caller sees it, Python included, on an
    idle GPU ("call"), and of the contenders named in on_gpu, what it takes there ("GPU").

    pytest-benchmark's own rounds of ours, by the processor's clock, come last. The results so far
    are written after each comparison, since a run on a GPU may be cut off.
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
        calls = timing.interleave(contenders, budget, timing.cuda_seconds)
        clock = partial(timing.cuda_seconds, cycles=HEAD_START)
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
        comparison.missing = missing
        benchmark.extra_info.update(case=case, relative_error=error, seconds=comparison.seconds)
        config.stash[COMPARISONS].append(comparison)
        path: Path | None = config.getoption("results")
        if path is not None:
            if FACTS not in config.stash:
                config.stash[FACTS] = report.facts()
            known = config.stash[FACTS]
            report.write(path, config.stash[COMPARISONS], [], config.stash[LOAD], known)

    return run


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
        terminalreporter.write_line("of the medians (quartiles of the rounds); case is TxBxH")
        processors = len(os.sched_getaffinity(0))
        load = f"{config.stash[LOAD]:.1f} on {processors} processors"
        terminalreporter.write_line(f"load before the run: {load}\n")
        terminalreporter.write_line(report.tables(comparisons))
    path: Path | None = config.getoption("results")
    if path is not None:
        report.write(path, comparisons, failed, config.stash[LOAD])
        terminalreporter.write_line(f"\nwritten: {path}")
