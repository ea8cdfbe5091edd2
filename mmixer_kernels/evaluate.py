"""`python -m mmixer_kernels.evaluate CHECKPOINT`: repeats a run's result."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import command
from .errors import user_errors
from .trained import evaluation, missing
from .trained.restore import Overrides
from .training import distributed, result
from .training.options import Precision

PROG = "python -m mmixer_kernels.evaluate"


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluates a checkpoint of a training run; the one that result.json names repeats it."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    split: Literal["test", "validation"] = "test"
    """The samples to evaluate on."""
    root: Path | None = None
    """Folder of the data set's files, where it is not the run's."""
    batch_size: int | None = None
    """Samples per step; when None, the run's. Another one can change a result in its last bits."""
    workers: int | None = None
    """Processes that load samples; when None, the run's."""
    device: str = "auto"
    """Device of the network, as PyTorch names it; auto is the run's or, where that cannot be used
    here, what there is, with a note. Another kind than the run's changes the last bits."""
    precision: Precision | None = None
    """Autocast of the network's arithmetic; when None, the run's."""
    streams: bool = False
    """Train a classifier on each modality's state of the frozen network (Eq. 15-16) and tell what
    each stream knows, as in Table 4; predict reads them beside the checkpoint."""
    missing: bool = False
    """Tell the accuracy that is left when one modality is absent (its inputs are zeros), and when
    white noise of 0.5, 1 and 2 times its inputs' standard deviation over the split is added to it;
    the noise is the same every time."""
    quantized: bool = False
    """Tell also the accuracy with int8 weights in the network's MCUs, which then go through the
    sequences step by step; on a CPU."""
    output: Path | None = None
    """JSON file to write the report to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 after a mistake of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    import tyro

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(EvaluateOptions)
    chosen = tyro.cli(positional, prog=PROG, args=list(arguments))
    report = evaluation.evaluate(
        chosen.checkpoint,
        chosen.split,
        Overrides(chosen.root, chosen.batch_size, chosen.workers, chosen.device, chosen.precision),
        chosen.streams,
        chosen.missing,
        chosen.quantized,
    )
    if not distributed.is_first():
        return 0
    print(result.describe(report, chosen.split))
    for modality, stream in report.get("streams", {}).items():
        print(result.stream_line(modality, stream["accuracy"]))
    if chosen.missing:
        print(missing.describe(report))
    if chosen.quantized:
        print(f"with int8 weights: accuracy {report['quantized']['accuracy']:.2%}")
    if chosen.output is not None:
        with user_errors():
            chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
