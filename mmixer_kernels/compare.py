"""`python -m mmixer_kernels.compare`: the user's own shape beside nn.GRU, nn.LSTM and the eager
equations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from . import command
from .command import processors
from .comparison import Case, WrongResult, compare, describe
from .engines import chosen
from .errors import UserError, user_errors
from .training.options import automatic_device
from .training.run import device_of

PROG = "python -m mmixer_kernels.compare"


@dataclass(frozen=True)
class CompareOptions:
    """Tells of one FusedMCU of this shape which engine takes its calls, and why; its time beside
    nn.GRU, nn.LSTM and the eager equations; the memory that each keeps for backward; what limits
    it, and what slows it in this environment. Where its results are farther from float64 than they
    may be, it says so and times nothing: exit code 1."""

    steps: int = 64
    """T, the time steps of a sequence."""
    batch: int = 8
    """B, the sequences of a call."""
    hidden: int = 512
    """H, the hidden size."""
    input_size: int | None = None
    """Features of a step; when None, the hidden size."""
    context_size: int | None = None
    """Features of the context; when None, the hidden size, and 0 is a unit without context."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Dtype of the inputs and parameters."""
    device: str = "auto"
    """Device, as PyTorch names it; auto is a GPU where there is one, else the processor."""
    engine: str = "auto"
    """Engine, as in FusedMCU; the environment variable MMIXER_ENGINE overrides auto."""
    threads: int | None = None
    """torch's threads; when None, as many as torch takes by itself."""
    budget: float = 10.0
    """Seconds for all rounds, about; at least five rounds are made."""
    forward_only: bool = False
    """Leave out the backward, and the memory that is kept for it."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, 1 where the unit's results are wrong, or 2 after a mistake
    of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    import tyro

    options = tyro.cli(CompareOptions, prog=PROG, args=list(arguments))
    _set_threads(options.threads)
    if not options.budget > 0:
        raise UserError(f"--budget must be more than 0 seconds, but is {options.budget}")
    case = _case(options)
    try:
        with _enough_memory():
            report = compare(case, options.budget, backward=not options.forward_only)
    except WrongResult as error:
        print(f"wrong results, so that nothing was timed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else describe(report))
    return 0


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turns the errors of memory that is not there into UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a RuntimeError that is no OutOfMemoryError.
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not short and "can't allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the memory does not suffice for this shape: {reason}: choose fewer --steps, a "
            "smaller --batch or --hidden, or --forward-only"
        ) from error


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    most = 16 * processors()  # some thousands end the process without a word
    if not 1 <= threads <= most:
        raise UserError(f"--threads must be 1 to {most} on this machine, but is {threads}")
    torch.set_num_threads(threads)


def _case(options: CompareOptions) -> Case:
    device = device_of(automatic_device() if options.device == "auto" else options.device)
    with user_errors(RuntimeError):
        case = Case(
            options.steps,
            options.batch,
            options.hidden,
            options.input_size,
            options.context_size,
            getattr(torch, options.dtype),
            device,
            options.engine,
        )
        chosen(case.engine, torch.empty(0, **case.like))  # an engine that cannot run raises here
    return case


if __name__ == "__main__":
    sys.exit(main())
