"""The CPU engine's forward against this machine's limits, measured in turns with it.

Limits: multiplications and additions of one thread's or two threads' float32 matrix product by MKL
(torch.mm, 1024 x 1024 x 1024), a lower bound of what the FMA units can do, so that a share of it
can pass 100 %; bytes read by torch.dot from buffers in L2 and in L3, as the slope between the
fastest reads of two sizes by one thread, which leaves the cost of a call out; two threads are
taken to read twice as fast.

A step of the recurrence multiplies 3 H^2 weights with B rows and reads them once: from L2 where
each thread's part fits there, else from L3. The engine cannot be asked for the recurrence alone,
so its time is derived: the whole forward less the projections W_f f and W_s fbar, taken at the
rate of a forward of one step with T B samples, which has the same products but all of them large.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import problems
import pytest
import torch
from conftest import Compare
from problems import Forward, Size
from timing import Contender, Times

from mmixer_kernels import FusedMCU

STEPS, HIDDEN = 64, 512
SGEMM = 1024
FLOAT = 4
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@pytest.mark.parametrize("batch", [8, 16])
def test_roofline(compare: Compare, batch: int, threads: int) -> None:
    l2, l3 = _cache_size(2), _cache_size(3)
    size = Size(STEPS, batch, HIDDEN)
    cpu = torch.device("cpu")
    error = problems.check_sequence(size, "cpu", cpu, threads)
    torch.manual_seed(0)
    unit = FusedMCU(*[HIDDEN] * 3, engine="cpu")
    wide = problems.sequence_operands(Size(1, STEPS * batch, HIDDEN), cpu)
    a, b, c = (torch.randn(SGEMM, SGEMM) for _ in range(3))
    reads = {
        "L2": (l2 // 4, l2 * 3 // 4),
        "L3": (l2 + l3 // 16, l2 + l3 // 6),
    }
    contenders = [
        Contender("FusedMCU", Forward(unit, problems.sequence_operands(size, cpu))),
        Contender("one step", Forward(unit, wide)),
        Contender("sgemm", lambda: torch.mm(a, b, out=c)),
    ]
    for level, sizes in reads.items():
        contenders += [Contender(f"{level} {bytes}", _read(bytes)) for bytes in sizes]

    def shares(times: Times) -> dict[str, str]:
        time = {name: median(x) for name, x in times.items()}
        fastest = {name: min(x) for name, x in times.items()}
        peak = 2 * SGEMM**3 / time["sgemm"]
        bandwidth = {
            level: threads
            * REPEATS
            * (large - small)
            / (fastest[f"{level} {large}"] - fastest[f"{level} {small}"])
            for level, (small, large) in reads.items()
        }
        if min(bandwidth.values()) <= 0:
            raise RuntimeError("a larger buffer was read in less time: too noisy to measure")
        rows, square = STEPS * batch, HIDDEN * HIDDEN
        whole = 2 * square * (5 * rows + 2 * batch) / time["FusedMCU"]
        projections = time["one step"] * (2 * rows + 2 * batch) / (7 * rows)
        recurrence = time["FusedMCU"] - projections
        weights = 3 * square * FLOAT
        level = "L2" if weights <= threads * l2 else "L3"
        compute, memory = 2 * 3 * square * rows / peak, STEPS * weights / bandwidth[level]
        return {
            "sgemm GFLOP/s a thread": f"{peak / threads / 1e9:.0f}",
            "L2 GB/s a thread": f"{bandwidth['L2'] / threads / 1e9:.0f}",
            "L3 GB/s a thread": f"{bandwidth['L3'] / threads / 1e9:.0f}",
            "whole forward / sgemm": f"{whole / peak:.0%}",
            "recurrence (derived) / nearer limit": f"{max(compute, memory) / recurrence:.0%}",
            "nearer limit": "sgemm" if compute >= memory else level,
        }

    table = "FusedMCU, forward, against the roofline"
    compare(table, str(size), contenders, threads=threads, error=error, shares=shares)


REPEATS = 20
"""Reads of a buffer in a timed call."""


def _read(bytes: int) -> Callable[[], None]:
    """One thread's `REPEATS` reads of `bytes` of memory, in two halves."""
    x, y = (torch.randn(bytes // FLOAT // 2) for _ in range(2))

    def call() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(REPEATS):
            torch.dot(x, y)
        torch.set_num_threads(threads)

    return call


def _cache_size(level: int) -> int:
    """Bytes of the first processor's cache; skips the test where the system does not tell."""
    for index in sorted(CACHES.glob("index*")):
        kind = (index / "type").read_text().strip()
        if (index / "level").read_text().strip() == str(level) and kind != "Instruction":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    pytest.skip(f"{CACHES} does not tell the size of a level {level} cache")
