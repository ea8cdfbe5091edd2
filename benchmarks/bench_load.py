"""How much longer a call takes while other processes compute, each contender against itself.

The others are endless loops, the first pinned to one processor, the second to another; what is
timed is pinned nowhere. A time is the mean of several calls in a row, some 50 ms on an idle
machine: single calls count the scheduler's ticks. The pool's waiting is libgomp's default.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import problems
import pytest
import torch
from conftest import Compare
from problems import Size

from mmixer_kernels.comparison.timing import Contender, seconds

CPU = torch.device("cpu")
SIZE = Size(64, 8, 512)
PASSES = "forward + backward"
BESIDE = {"no other process": 0, "one other process": 1, "two other processes": 2}
IN_A_ROW = 0.05
"""Seconds of calls in a row on an idle machine."""
SETTLE = 0.03
"""Seconds in which the scheduler places what has begun or ended."""

Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def others() -> Iterator[list[Process]]:
    """Processes that compute, on a processor each, stopped."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no process to a processor")
    count, here = max(BESIDE.values()), sorted(os.sched_getaffinity(0))
    if len(here) < count:
        pytest.skip(f"{count} other processes need {count} processors, here are {len(here)}")
    processes: list[Process] = []
    try:
        for processor in here[:count]:
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
            os.sched_setaffinity(processes[-1].pid, {processor})
            processes[-1].send_signal(signal.SIGSTOP)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_slow_down(compare_slow_downs: Compare, others: list[Process], threads: int) -> None:
    error = problems.check_sequence(SIZE, "cpu", CPU, threads)
    contenders = [
        x
        for x in problems.sequence_contenders(SIZE, PASSES, "cpu", CPU)
        if x.name in ("FusedMCU", "nn.GRU", "nn.LSTM")
    ]
    in_a_row: dict[str, int] = {}

    def clock(contender: Contender, beside: str) -> float:
        computing = others[: BESIDE[beside]]
        if not in_a_row.get(contender.name):
            alone = median(seconds(contender.call) for _ in range(5))
            in_a_row[contender.name] = max(1, round(IN_A_ROW / alone))
        count = in_a_row[contender.name]
        for process in computing:
            process.send_signal(signal.SIGCONT)
        time.sleep(SETTLE)
        try:
            contender.call()
            return seconds(lambda: [contender.call() for _ in range(count)]) / count
        finally:
            for process in computing:
                process.send_signal(signal.SIGSTOP)

    compare_slow_downs(
        f"Slow-down beside other processes, {PASSES} at {SIZE}",
        contenders,
        threads=threads,
        error=error,
        beside=list(BESIDE),
        clock=clock,
    )
