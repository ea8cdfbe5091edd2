"""How much longer a call takes while other processes compute.

The others are endless loops, one pinned to each processor in turn, which stop while calls are timed
without them; what is timed is pinned nowhere. Each time is that of several calls in a row, some
50 ms on an idle machine: shorter ones count the scheduler's ticks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import problems
import pytest
import report
import timing
import torch
from conftest import Record
from problems import Size

CPU = torch.device("cpu")
SIZE = Size(64, 8, 512)
OTHERS = (0, 1, 2)
IN_A_ROW = 0.05
"""Seconds of calls in a row on an idle machine."""
SETTLE = 0.03
"""Seconds after which the scheduler has placed what has begun or ended."""


@contextmanager
def others(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute, one pinned to each processor in turn."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no process to a processor")
    here = sorted(os.sched_getaffinity(0))
    if len(here) < count:
        pytest.skip(f"{count} other processes need {count} processors, here are {len(here)}")
    processes = []
    try:
        for i in range(count):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
            os.sched_setaffinity(processes[i].pid, {here[i]})
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def computing(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(SETTLE)
    yield
    for process in processes:
        process.send_signal(signal.SIGSTOP)


def test_slow_down(record: Record, threads: int, budget: float) -> None:
    """Every round has each number of other processes, and every contender beside each."""
    error = problems.check_sequence(SIZE, "cpu", CPU, threads)
    contenders = [
        x
        for x in problems.sequence_contenders(SIZE, "forward + backward", "cpu", CPU)
        if x.name in ("FusedMCU", "nn.GRU", "nn.LSTM")
    ]
    if record is None:
        contenders[0].call()
        return
