"""`python -m mmixer_kernels.tune`: chooses the triton engine's tiles on this GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from . import command, tuning
from .engines import triton_tuning
from .errors import user_errors

PROG = "python -m mmixer_kernels.tune"


@dataclass(frozen=True)
class TuneOptions:
    """Measures at most half a dozen tilings of the triton engine's kernels, forward and backward,
    on this GPU, and keeps the fastest on disk for this hidden size and dtype. Later calls use it;
    without it they run with a fixed default, and nothing is tuned by itself."""

    hidden_size: int = 512
    """H, the hidden size of the units that are to be fast."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Dtype of the features and weights."""
    batch_size: int = 8
    """Samples of the measured call."""
    steps: int = 16
    """Time steps of the measured call."""
    weight_sets: int = 2
    """Units per call: M-Mixer's modalities."""
    device: str = "cuda"
    """The GPU, as PyTorch names it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 after a mistake of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    import tyro

    options = tyro.cli(TuneOptions, prog=PROG, args=list(arguments))
    with user_errors(RuntimeError):
        trials = tuning.tune_unit(
            options.hidden_size,
            getattr(torch, options.dtype),
            torch.device(options.device),
            batch_size=options.batch_size,
            steps=options.steps,
            weight_sets=options.weight_sets,
        )
    for trial in trials:
        tile = ", ".join(f"{name} {value}" for name, value in trial.configuration._asdict().items())
        time = trial.reason if trial.seconds is None else f"{trial.seconds * 1e6:.0f} us"
        print(f"{tile}: {time}")
    print(f"the first is kept in {triton_tuning.path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
