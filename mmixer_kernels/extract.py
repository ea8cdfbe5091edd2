"""`python -m mmixer_kernels.extract`: writes a data set's features as arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import command
from .trained import features
from .trained.restore import Overrides, restore
from .training import parsing

PROG = "python -m mmixer_kernels.extract"


@dataclass(frozen=True)
class FromCheckpoint:
    """Writes the features of a run's data set by its trained extractors, as `--data arrays` reads
    them. With --data NAME instead of a checkpoint the networks are those of --model.weights, and
    the options are others: --data NAME --help shows them."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    output: Path | None = None
    """Folder to write the arrays to, new or empty; when None, features beside the checkpoint."""
    root: Path | None = None
    """Folder of the data set's files, where it is not the run's."""
    batch_size: int | None = None
    """Samples per step; when None, the run's."""
    workers: int | None = None
    """Processes that load samples; when None, the run's."""
    device: str = "auto"
    """Device of the network, as PyTorch names it; auto is the run's or, where that cannot be used
    here, what there is, with a note."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 after a mistake of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    if any(argument.partition("=")[0] == "--data" for argument in arguments):
        chosen = parsing.parse_extract(arguments, PROG)
        output = chosen.output
        written = features.of_pretrained(chosen, output)
    else:
        import tyro

        positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(FromCheckpoint)
        given = tyro.cli(positional, prog=PROG, args=list(arguments))
        output = given.output or given.checkpoint.with_name("features")
        overrides = Overrides(given.root, given.batch_size, given.workers, given.device)
        restored = restore(given.checkpoint, overrides)
        written = features.of_checkpoint(restored, output)
    for file in written:
        print(f"{file.path}: {file.samples} samples, up to {file.steps} steps")
    print(f"train on them: python -m mmixer_kernels.train --data arrays --root {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
