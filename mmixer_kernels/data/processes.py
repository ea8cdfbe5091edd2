"""Tasks in several processes, with progress on stderr, stopped by a signal between two steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from ..errors import UserError
from ..stop import Stop

STOPPING = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL = 0.2
"""Seconds between two looks at the processes' progress."""
REPORT_INTERVAL = 30.0
"""Seconds between two lines of progress where there is no terminal."""


class Task(Protocol):
    """Something to do in as many steps as its length."""

    def __len__(self) -> int: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")

Step = Callable[[], None]
"""A function that a task calls after each step; it raises when the task is cancelled."""


def run(function: Callable[[T, Step], R], tasks: Sequence[T], workers: int, title: str) -> list[R]:
    """Calls a function for each task, and gives the results in the order of the tasks.

    Args:
        function: a function of a module's top level; it gets a task, and a `Step` to call after
            each step.
        workers: number of processes; 1 is this process alone.
        title: title of the progress, as "converted".

    Raises:
        stop.Interrupted: a signal came; each process has given up its task after the step in hand.
        UserError: a process was killed.
    """
    with Stop() as stop, Progress(title, sum(map(len, tasks))) as progress:
        if workers > 1 and len(tasks) > 1:
            return _in_processes(function, tasks, workers, progress, stop)
        results = []
        for task in tasks:
            before = progress.done

            def step() -> None:
                progress.advance_to(progress.done + 1)
                stop.check()

            results.append(function(task, step))
            progress.advance_to(before + len(task))
        return results


class Progress:
    """A context that shows how many samples of a total are done: a bar on a terminal, and elsewhere
    a line every REPORT_INTERVAL."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.reported = time.perf_counter()
        self.bar = tqdm(
            desc=title,
            total=total,
            unit=" samples",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {rate_fmt} ETA {remaining}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._report()
        self.bar.close()

    def advance_to(self, done: int) -> None:
        """Shows that this many samples are done."""
        self.bar.update(done - self.done)
        self.done = done
        if time.perf_counter() - self.reported > REPORT_INTERVAL:
            self._report()

    def _report(self) -> None:
        if not self.bar.disable:
            return
        self.reported = time.perf_counter()
        rate = self.done / (self.reported - self.start)
        eta = tqdm.format_interval((self.total - self.done) / rate) if rate else "unknown"
        print(
            f"{self.title} {self.done}/{self.total} samples, {rate:.1f} per second, ETA {eta}",
            file=sys.stderr,
            flush=True,
        )


class _Cancelled(Exception):
    """The task was cancelled: another one failed, or a signal came."""


def _in_processes(
    function: Callable[[T, Step], R],
    tasks: Sequence[T],
    workers: int,
    progress: Progress,
    stop: Stop,
) -> list[R]:
    context = multiprocessing.get_context("spawn")
    # Without locks: a process that is killed while it holds one would stop all the others.
    steps = context.RawArray("q", len(tasks))
    cancelled = context.RawValue("b", 0)
    count = min(workers, len(tasks))
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    with _signals_blocked():
        pool = ProcessPoolExecutor(count, context, _start, (steps, cancelled))
        futures = [pool.submit(_call, function, task, i) for i, task in enumerate(tasks)]
    try:
        pending = set(futures)
        while pending:
            done, pending = wait(pending, POLL_INTERVAL, FIRST_COMPLETED)
            for future in done:
                future.result()
            progress.advance_to(sum(steps))
            stop.check()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        stop.check()  # a SIGTERM to all of them is no accident
        raise UserError(
            f"one of {count} processes was killed, perhaps because memory ran out: run the command "
            "again, with fewer --workers; what is finished is kept"
        ) from error
    finally:
        cancelled.value = 1
        pool.shutdown(cancel_futures=True)


_shared: tuple[Any, Any]
"""The steps done of each task, and whether the tasks are cancelled; set in a worker."""


def _start(steps: Any, cancelled: Any) -> None:
    global _shared
    _shared = steps, cancelled
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would write beside the command that goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[T, Step], R], task: T, number: int) -> R:
    steps, cancelled = _shared

    def step() -> None:
        steps[number] += 1
        if cancelled.value:
            raise _Cancelled

    result = function(task, step)
    steps[number] = len(task)
    return result


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks the signals that stop a command until the processes started here are ready to leave
    them to its first process; one that comes meanwhile is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
