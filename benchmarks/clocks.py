"""The benchmarks' own clocks, of a GPU and of this process's processors, and what they tell.

The turns and the ratios are those of `mmixer_kernels.comparison.timing`.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from mmixer_kernels.comparison.timing import Contender, Times, seconds, synchronised


class HostSeconds(float):
    """A time on the GPU that is the host's: the GPU woke before the whole call was enqueued."""


def by_host(times: Times) -> list[str]:
    """Contenders with `HostSeconds` in more than half of the rounds: their median is the host's."""
    return [
        name
        for name, rounds in times.items()
        if 2 * sum(isinstance(x, HostSeconds) for x in rounds) > len(rounds)
    ]


def add_if_it_runs(
    contenders: list[Contender],
    missing: dict[str, str],
    name: str,
    make: Callable[[str], Contender],
    device: torch.device,
    limit: int,
) -> None:
    """Adds `make(name)` to contenders after its first call, or to missing why there is none.

    limit: seconds for both, since what is compiled may take very long.
    """
    try:
        with _time_limit(limit):
            contender = make(name)
            synchronised(contender, device).call()
    except Exception as problem:
        missing[name] = reason(problem)
    else:
        contenders.append(contender)


def reason(problem: Exception) -> str:
    """One line for a table."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


@contextmanager
def _time_limit(limit: int) -> Iterator[None]:
    """TimeoutError after so many seconds of Python code."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CALLS = 8
"""Calls in a row of which `processor_seconds` takes the time."""


def processor_seconds(call: Callable[[], object]) -> float:
    """Seconds of this process's processors that a call takes, the mean of `CALLS` in a row.

    It is for calls of microseconds that do not wait and have one thread: what else the machine does
    in that time is not in it, and several calls are long beside the reading of the clock.
    """
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def cuda_seconds(call: Callable[[], object], cycles: int = 0) -> float:
    """Seconds between CUDA events around a call on the current stream of an idle GPU.

    With cycles, the GPU first sleeps so long, and the host hurries ahead: what the call takes on
    the GPU alone, where the host has come to the end of the call before the GPU wakes. Where it has
    not, the answer is `HostSeconds`.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    call()
    end.record()
    awake = start.query()
    end.synchronize()
    duration = start.elapsed_time(end) / 1e3
    return HostSeconds(duration) if cycles and awake else duration


class CallSeconds(float):
    """The time of a call as its caller sees it, and until it returned."""

    host: float


def call_seconds(call: Callable[[], object]) -> CallSeconds:
    """`cuda_seconds` of a call on an idle GPU, and beside it the host's time."""
    host: list[float] = []
    answer = CallSeconds(cuda_seconds(lambda: host.append(seconds(call))))
    answer.host = host[0]
    return answer


def host_seconds(times: Times) -> dict[str, float]:
    """The median of the host's time, by contender, of times that `call_seconds` took."""
    return {
        name: median(x.host for x in rounds if isinstance(x, CallSeconds))
        for name, rounds in times.items()
    }


def kernels(call: Callable[[], object]) -> dict[str, int]:
    """Names of the kernels, copies and fills that a call starts on the GPU, and how often.

    RuntimeError where torch's profiler saw none; what it raises by itself, it raises here.
    """
    call()  # what only a first call does
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.profiler.DeviceType.CUDA
    names = Counter(event.name for event in profile.events() if event.device_type == on_gpu)
    if not names:
        raise RuntimeError("torch's profiler saw nothing on the GPU")
    return dict(names)
