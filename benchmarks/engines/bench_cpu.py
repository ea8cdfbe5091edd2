"""The CPU engine's recurrence against this machine's limits, measured in turns with it.

Limits (benchmarks/limits): multiply-adds in registers, and reading from L2 and from L3, by as many
threads as the engine has. A step of the recurrence multiplies 3 H^2 weights with B rows and reads
them once: from L2 where each thread's part fits there, else from L3. The nearer limit is the one
that takes longer at its full rate. Time of the recurrence is taken inside the call of the engine:
all of its steps, with their norms, gates and barriers.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import limits
import problems
import pytest
import torch
from conftest import Compare
from problems import Size

from mmixer_kernels import reference
from mmixer_kernels.comparison.timing import Contender, Times
from mmixer_kernels.problem import Call, Form, Problem

STEPS, HIDDEN = 64, 512
FLOAT = 4
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ROUNDS = {"multiply-adds": 20_000, "L2": 100, "L3": 10}
"""Rounds of the loops that measure the limits: about a millisecond each."""


@pytest.mark.parametrize("batch", [8, 16])
def test_roofline(compare: Compare, batch: int, threads: int) -> None:
    size = Size(STEPS, batch, HIDDEN)
    device = torch.device("cpu")
    error = problems.check_sequence(size, "cpu", device, threads)
    torch.manual_seed(0)
    weights = reference.MCU(*[HIDDEN] * 3).weights()
    input, context = problems.sequence_operands(size, device)
    machine = limits.module()
    problem = Problem([input], [context], [weights])
    call, tensors = Call(Form.of(problem.flat()), "nothing"), problem.tensors()
    output = torch.empty(size)
    recurrence: list[float] = []
    operations: list[int] = []
    l2, l3 = _cache_size(2), _cache_size(3)
    blocks = {
        "L2": torch.randn(threads * l2 * 3 // 4 // FLOAT),
        "L3": torch.randn((threads * l2 + l3 // 6) // FLOAT),
    }

    def forward() -> None:
        seconds = machine.recurrence_seconds(
            call=call, tensors=tensors, threads=threads, output=output
        )
        recurrence.append(seconds)

    def multiply_add() -> None:
        operations.append(machine.multiply_add(ROUNDS["multiply-adds"], threads))

    def read(level: str) -> Contender:
        block, rounds = blocks[level], ROUNDS[level]
        return Contender(
            level, lambda: machine.read(block.data_ptr(), block.numel(), rounds, threads)
        )

    def shares(times: Times) -> dict[str, str]:
        time = {name: median(x) for name, x in times.items()}
        peak = operations[-1] / time["multiply-adds"]
        bandwidth = {
            level: block.numel() * FLOAT * ROUNDS[level] / time[level]
            for level, block in blocks.items()
        }
        weights = 3 * HIDDEN**2
        level = "L2" if weights * FLOAT <= threads * l2 else "L3"
        compute = STEPS * 2 * weights * batch / peak
        memory = STEPS * weights * FLOAT / bandwidth[level]
        return {
            "FMA peak, GFLOP/s a thread": f"{peak / threads / 1e9:.0f}",
            "L2, GB/s a thread": f"{bandwidth['L2'] / threads / 1e9:.0f}",
            "L3, GB/s a thread": f"{bandwidth['L3'] / threads / 1e9:.0f}",
            "nearer limit": "FMA peak" if compute >= memory else level,
            "recurrence / nearer limit": f"{max(compute, memory) / median(recurrence):.0%}",
        }

    contenders = [
        Contender("FusedMCU", forward),
        Contender("multiply-adds", multiply_add),
        read("L2"),
        read("L3"),
    ]
    table = "Recurrence of FusedMCU, forward, against the roofline"
    compare(table, str(size), contenders, threads=threads, error=error, shares=shares)


def _cache_size(level: int) -> int:
    """Bytes of the first processor's cache; skips the test where the system does not tell."""
    for index in sorted(CACHES.glob("index*")):
        kind = (index / "type").read_text().strip()
        if (index / "level").read_text().strip() == str(level) and kind != "Instruction":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    pytest.skip(f"{CACHES} does not tell the size of a level {level} cache")
