"""Several trainings side by side, each in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from ..command import processors

PRELOADED = (
    "mmixer_kernels.train",
    "mmixer_kernels.evaluate",
    "torch._dynamo",
    "matplotlib.figure",
)
"""Modules that take seconds to import: a process that has them is forked for each task."""


@dataclass(frozen=True)
class Task:
    """Commands of this package, one after another.

    Args:
        commands: the names of commands and their arguments.
        log: the file that their output is added to.
        work: amount of work, in any unit.
        done: gives the amount that has been done by now.
        ended: gets, in the task's process, the seconds it took when it has ended well.
    """

    name: str
    commands: Sequence[tuple[str, list[str]]]
    log: Path
    work: int
    done: Callable[[], int]
    ended: Callable[[float], None]


@dataclass(frozen=True)
class Failure:
    """A task that failed, and why."""

    task: Task
    reason: str


def run(tasks: Sequence[Task], jobs: int, gpus: Sequence[str] = ()) -> list[Failure]:
    """Runs every task, `jobs` of them at a time, and goes on after one that fails.

    Processors are shared out evenly, and GPUs given out in turns. A signal reaches the commands,
    which keep what they have, before it acts here.

    Args:
        gpus: values for CUDA_VISIBLE_DEVICES; without any it stays as it is.
    """
    threads = max(1, processors() // jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    waiting, failures = list(tasks), []
    running: dict[BaseProcess, tuple[Task, int]] = {}
    # OMP_NUM_THREADS must be set as the server starts: its children take it over.
    with Progress(tasks) as progress, _terminable(), _omp_threads(threads):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop(0)
                    slot = min(set(range(jobs)) - {slot for _, slot in running.values()})
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    process: BaseProcess = context.Process(
                        target=_work, args=(task.commands, task.log, task.ended, threads, gpu)
                    )
                    process.start()
                    running[process] = (task, slot)
                wait([process.sentinel for process in running], timeout=1)
                for process in [process for process in running if not process.is_alive()]:
                    task, _ = running.pop(process)
                    if process.exitcode:
                        reason = f"exit code {process.exitcode}: {_last_line(task.log)}"
                        failures.append(Failure(task, reason))
                    progress.finished(task, bool(process.exitcode))
                progress.update()
        except BaseException:
            _end(list(running))
            raise
    return failures


@contextmanager
def _omp_threads(count: int) -> Iterator[None]:
    """Sets OMP_NUM_THREADS for the processes that are started meanwhile."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


class Progress:
    """A context that shows a bar on a terminal, and a line for each task that ends."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.ended = list(tasks), 0
        self.start, self.first = time.perf_counter(), sum(task.done() for task in tasks)
        self.total = sum(task.work for task in tasks)
        self.bar = tqdm(
            total=self.total,
            initial=self.first,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def finished(self, task: Task, failed: bool) -> None:
        """Prints a line for a task that has ended."""
        self.ended += 1
        self.bar.write(
            f"{self.ended}/{len(self.tasks)} {task.name}: {'failed' if failed else 'done'}, "
            f"{self._times()}",
            file=sys.stderr,
        )

    def update(self) -> None:
        """Shows what is done by now."""
        if self.bar.disable:
            return
        self.bar.n = sum(task.done() for task in self.tasks)
        self.bar.set_description_str(f"{self.ended}/{len(self.tasks)}", refresh=False)
        self.bar.set_postfix_str(self._times(), refresh=True)

    def _times(self) -> str:
        done = sum(task.done() for task in self.tasks)
        seconds = time.perf_counter() - self.start
        spent = tqdm.format_interval(seconds)
        if done == self.first:
            return spent
        rest = seconds * (self.total - done) / (done - self.first)
        return f"{spent}, ETA {tqdm.format_interval(rest)}"


class _terminable:
    """A context in which SIGTERM ends like Ctrl-C, so that the commands are told; and Ctrl-C does
    so also where the shell that started this lets background jobs ignore it."""

    def __enter__(self) -> None:
        self.previous = {
            number: signal.signal(number, signal.default_int_handler)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _work(
    commands: Sequence[tuple[str, list[str]]],
    log: Path,
    ended: Callable[[float], None],
    threads: int,
    gpu: str | None,
) -> None:
    """The body of a task's process: its exit code is the first command's that failed, or 1 after an
    exception, whose traceback multiprocessing prints."""
    os.setpgrp()  # a terminal's Ctrl-C must come once: a training takes the second as an order
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    import torch

    start = time.perf_counter()
    torch.set_num_threads(threads)
    for name, arguments in commands:
        module = f"mmixer_kernels.{name}"
        print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
        code = importlib.import_module(module).main(arguments)
        sys.stdout.flush()
        if code:
            sys.exit(code)
    ended(time.perf_counter() - start)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Lets trainings write their positions, and waits for them."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no output")
