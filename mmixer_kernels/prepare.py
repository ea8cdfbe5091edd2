"""`python -m mmixer_kernels.prepare`: converts a data set of video for fast reading."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import command
from .data import DATA, convert
from .data.video import VideoOptions
from .errors import user_errors
from .stop import Interrupted

PROG = "python -m mmixer_kernels.prepare"
OF_SOME = {
    "depth": ("ntu60", "ntu120"),
    "lists": ("clips",),
    "align": ("clips",),
    "rates": ("clips",),
}
"""Options that only these data sets have."""


@dataclass(frozen=True)
class PrepareOptions:
    """Converts a data set of video into shards of sampled, resized frames, which training reads
    many times faster; --root of the training then names their folder. A conversion that was stopped
    goes on when the same command is given again."""

    output: Path
    """Folder of the converted form."""
    data: Literal["clips", "ntu60", "ntu120", "nw-ucla"] | None = None
    """Data set."""
    root: Path | None = None
    """Folder of the raw files."""
    modalities: tuple[str, ...] | None = None
    """Modalities to convert; training may choose fewer. When None, the data set's default."""
    lists: Path | None = None
    """Folder of the lists of clips, as in training."""
    align: Literal["span", "rate"] | None = None
    """Frames of clips' modalities that belong together, as in training; span is the default."""
    rates: tuple[float, ...] | None = None
    """Frames per second of each of clips' modalities, in their order, for --align rate, as in
    training, which then needs them no more."""
    depth: Literal["masked", "full"] | None = None
    """NTU's depth of the bodies alone (the default), or with the background."""
    stride: int = 8
    """Keep every n-th frame of a clip; the default is the paper's. Training must sample in the same
    way."""
    frames: int | None = None
    """Keep this many frames of each clip instead, evenly spaced."""
    size: int = 256
    """Pixels of the frames' shorter side; training with --image-size 224 needs 256."""
    quality: int = 95
    """Quality of the JPEGs of colour and grey, 1 to 100; depth is kept exactly."""
    samples_per_shard: int = 256
    """Samples per file, the unit that is made anew after a stop."""
    workers: int = field(default_factory=command.processors)
    """Number of processes; it changes no byte of the result."""
    allow_missing: bool = False
    """Finish even though samples are missing or damaged. They are reported, and training asks for
    the same option where they are the test set's."""
    verify: bool = False
    """Only read the --output of an earlier conversion and compare it with its checksums."""

    def check(self) -> None:
        """Raises ValueError where an option cannot be as it is."""
        for name in ("stride", "frames", "size", "samples_per_shard", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, but is {value}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be in 1..100, but is {self.quality}")
        if not self.verify and (self.data is None or self.root is None):
            raise ValueError("--data and --root must say what to convert (or --verify --output)")
        for name, sets in OF_SOME.items():
            if getattr(self, name) is not None and self.data not in (None, *sets):
                raise ValueError(
                    f"--{name} is for {' and '.join(sets)}: leave it out for {self.data}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, 1 when raw files are missing or damaged or the verification
    found something, 2 after a mistake of the user, 130 after Ctrl-C."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    import tyro

    options = tyro.cli(PrepareOptions, prog=PROG, args=list(arguments))
    try:
        with user_errors():
            options.check()
            return _verify(options) if options.verify else _convert(options)
    except Interrupted as interruption:
        again = shlex.join([*PROG.split(), *arguments])
        print(f"stopped by {interruption}; go on with: {again}", file=sys.stderr)
        return 128 + interruption.number


def _convert(options: PrepareOptions) -> int:
    report = convert.prepare(
        _data(options),
        options.root,
        options.output,
        options.size,
        options.quality,
        options.samples_per_shard,
        options.workers,
    )
    for problem in report.problems:
        print(f"{problem.sample}: {problem.modality}: {problem.reason}", file=sys.stderr)
    for line in report.wrong:
        print(line, file=sys.stderr)
    pictures = ", ".join(f"{count:,} of {name}" for name, count in report.pictures.items())
    print(
        f"{options.output}: {report.samples:,} samples, {pictures}; {report.shards:,} shards "
        f"({report.kept:,} were there before), {report.size / 1e9:.3f} GB"
    )
    if report.complete:
        print(f"verified; train with --data {options.data} --root {options.output}")
        return 0
    if report.wrong:
        print("error: the shards above are damaged: run the command again", file=sys.stderr)
    else:
        print(
            f"error: {len(report.problems):,} files above are missing or damaged, so that the "
            "conversion is not complete: restore them and run the command again, which makes only "
            "their shards anew, or pass --allow-missing to do without them",
            file=sys.stderr,
        )
    return 1


def _data(options: PrepareOptions) -> VideoOptions:
    given: dict[str, Any] = {
        "modalities": options.modalities,
        "depth": options.depth,
        "lists": options.lists,
        "align": options.align,
        "rates": options.rates,
        "stride": options.stride,
        "frames": options.frames,
        "allow_missing": options.allow_missing,
    }
    assert options.data is not None  # the options' own check
    chosen: VideoOptions = DATA[options.data](
        **{name: value for name, value in given.items() if value is not None}
    )
    return chosen


def _verify(options: PrepareOptions) -> int:
    samples, wrong = convert.verify(options.output, options.workers)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(
            f"error: {options.output} is damaged: convert it again with the options it was made "
            "with, which makes only the damaged shards anew",
            file=sys.stderr,
        )
        return 1
    print(f"{options.output}: {samples:,} samples are as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
