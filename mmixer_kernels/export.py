"""`python -m mmixer_kernels.export CHECKPOINT --output FILE`: a network for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from . import command
from .errors import UserError
from .trained import export
from .trained.restore import Overrides, restore

PROG = "python -m mmixer_kernels.export"
FORMATS: dict[str, Literal["onnx", "torch"]] = {".onnx": "onnx", ".pt2": "torch"}


@dataclass(frozen=True)
class ExportOptions:
    """Writes a trained network as ONNX or as a program of torch.export, and checks the file."""

    checkpoint: tyro.conf.Positional[Path]
    """best.pt or last.pt of a run."""
    output: Path
    """File to write, .onnx or .pt2."""
    format: Literal["onnx", "torch"] | None = None
    """onnx runs anywhere; torch is loaded after `import mmixer_kernels`, for it uses its engine.
    None goes by the file's ending."""
    steps: int | None = None
    """Steps of every clip; when None any number, which GRU and LSTM cannot have, or the data set's
    where extractors join steps, as those of watch do."""
    root: Path | None = None
    """Folder of the data set's files, where it is not the run's; data sets of frames need none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 after a mistake of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    options = tyro.cli(ExportOptions, prog=PROG, args=list(arguments))
    kind = options.format or FORMATS.get(options.output.suffix)
    if kind is None:
        raise UserError(
            f"--output must end in .onnx or .pt2, but is {options.output}: or choose by --format"
        )
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps must be 1 or more, but is {options.steps}")
    restored = restore(options.checkpoint, Overrides(options.root, device="cpu"), "shapes")
    written = export.export(restored, options.output, kind, options.steps)
    shapes = ", ".join(
        f"{name} [{', '.join(map(str, shape))}]" for name, shape in written.inputs.items()
    )
    print(f"{written.path}: float32 {shapes} to logits [batch, {written.classes}]")
    print("sizes that have a name are free, the others fixed; a batch's clips have all steps")
    if restored.data.moments is not None:
        print("features are as the data set's files have them: the network standardizes them")
    print(
        f"checked on random inputs of other sizes: greatest error {written.error:.1e}, "
        f"allowed {written.allowed:.1e}"
    )
    if kind == "torch" and restored.engine is not None:
        print(f"it uses the engine {restored.engine}: import mmixer_kernels before it is loaded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
