"""The host's time of a call beside that of nn.GRU's smallest call on a CPU. It needs no GPU.

Of the CUDA engine, kernels and products are counted and not run (csrc/emulator): what is left is
what the caller's thread does until the call returns, without the driver's part of the launches. The
CPU engine has a size at which there is next to nothing to compute. Times are those of a processor,
of one thread.

Memory that a call frees stays with the process, as it does with torch's allocator on a GPU: a call
that maps its workspace anew waits for the operating system longer than for all else.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import emulation
import problems
import pytest
import torch
from conftest import Compare
from problems import Group, Size
from torch import Tensor, nn

from mmixer_kernels import functional
from mmixer_kernels.comparison.passes import PASSES, RECORDED, contender
from mmixer_kernels.comparison.timing import Contender
from mmixer_kernels.engines import cuda

pytestmark = [
    pytest.mark.benchmark(timer=time.process_time),
    pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"]),
]

CPU = torch.device("cpu")
SMALLEST = Size(1, 1, 16)
PAPER = Size(9, 8, 512)
CHECKED = Size(3, 2, 16)
"""The emulator runs the kernels of this size, so that what is then counted is known to be right."""
MODALITIES = 3
TOLERANCES = {"bfloat16": 5e-2, "float32": 1e-4}

LARGEST_INT = 2**31 - 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

every_pass = pytest.mark.parametrize("passes", [PASSES[0], RECORDED, PASSES[1]])
every_path = pytest.mark.parametrize("path", ["cluster", "cooperative"])


@pytest.mark.parametrize(
    ("precision", "path"),
    [
        ("bfloat16", "cluster"),
        ("bfloat16", "cooperative"),
        ("float32", "cooperative"),  # three terms per float leave a cluster no room at this size
    ],
)
@every_pass
def test_cuda(
    compare_on_host: Compare, passes: str, precision: str, path: str, threads: int
) -> None:
    dtype = getattr(torch, precision)
    with _emulated(path) as module:
        error = problems.check_sequence(
            CHECKED, "cuda", CPU, threads, dtype, TOLERANCES[precision], f"emulated {path}"
        )
        module.configure(run=False)
        ours = problems.sequence_contenders(PAPER, passes, "cuda", CPU, dtype)[0]
        compare_on_host(
            f"FusedMCU, engine cuda, {precision}, {passes}",
            f"{PAPER}, {path}",
            [ours, _smallest(passes)],
            error=error,
            kernels=lambda: {ours.name: emulation.launches(module, ours.call)},
        )


@every_path
@every_pass
def test_cuda_group(compare_on_host: Compare, passes: str, path: str, threads: int) -> None:
    """N modalities in one call beside one."""
    precision = "bfloat16"
    dtype = getattr(torch, precision)
    with _emulated(path) as module:
        error = max(
            problems.check_group(CHECKED, count, "cuda", CPU, threads, dtype, TOLERANCES[precision])
            for count in (MODALITIES, 1)
        )
        module.configure(run=False)
        group = Group.random(PAPER, MODALITIES, CPU, dtype)
        single = Group(*(x[:1] for x in group))
        ours = [_grouped(part, passes) for part in (group, single)]
        compare_on_host(
            f"functional.mcu_group, engine cuda, {precision}, {passes}",
            f"{PAPER}, {path}",
            [*ours, _smallest(passes)],
            error=error,
            kernels=lambda: {x.name: emulation.launches(module, x.call) for x in ours},
        )


@every_pass
def test_cpu(compare_on_host: Compare, passes: str, threads: int) -> None:
    error = problems.check_sequence(SMALLEST, "cpu", CPU, threads)
    contenders = problems.sequence_contenders(SMALLEST, passes, "cpu", CPU)
    compare_on_host(f"FusedMCU, engine cpu, {passes}", str(SMALLEST), contenders, error=error)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@every_pass
def test_cpu_cell(compare_on_host: Compare, passes: str, weights: str, threads: int) -> None:
    dtype = getattr(torch, weights)
    error = problems.check_cell(SMALLEST, "cpu", CPU, threads, dtype)
    contenders = problems.cell_contenders(SMALLEST, passes, "cpu", CPU, dtype)
    compare_on_host(
        f"FusedMCUCell, engine cpu, {weights} weights, {passes}",
        str(SMALLEST),
        contenders,
        error=error,
    )


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> None:
    """malloc gives nothing back to the operating system; where it is not glibc's, it may."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
        mallopt(M_MMAP_THRESHOLD, LARGEST_INT)


@contextmanager
def _emulated(path: str) -> Iterator[ModuleType]:
    """The engine "cuda" over the emulator, with one path."""
    module = emulation.module()
    with emulation.engine(module), mock.patch.object(cuda, "PATHS", (path,)):
        yield module


def _smallest(passes: str) -> Contender:
    input, _ = problems.sequence_operands(SMALLEST, CPU)
    gru = nn.GRU(SMALLEST.hidden, SMALLEST.hidden)
    return contender(f"nn.GRU on a CPU, {SMALLEST}", gru, [input], passes)


def _grouped(group: Group, passes: str) -> Contender:
    def function(*_: Tensor) -> Tensor:
        return functional.mcu_group(*group, engine="cuda")[0]

    name = f"one call of N = {len(group.inputs)}"
    return contender(name, function, list(group.operands().values()), passes)
