"""`python -m mmixer_kernels.predict CHECKPOINT FILES...`: a network's predictions for samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from . import command
from .errors import UserError, user_errors
from .trained import pictures, predictions, scores, streams
from .trained.predictions import Prediction
from .trained.restore import Overrides, Samples, restore, tell_device
from .training.options import Precision

PROG = "python -m mmixer_kernels.predict"
MOST_SHOWN = 20
"""Samples that are printed and drawn: a PNG file has room for some more, an eye has not."""


@dataclass(frozen=True)
class PredictOptions:
    """Prints the most likely classes of samples, with confidences, for each stream and for all
    together, and draws them beside the samples' frames (the paper's Figure 5)."""

    checkpoint: tyro.conf.Positional[Path]
    """best.pt or last.pt of a run. The streams' own predictions need the classifiers that
    python -m mmixer_kernels.evaluate CHECKPOINT --streams writes."""
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files and folders of one or more samples. A network of clips takes files and folders as
    .../rgb/NAME.mp4 and .../depth/NAME, a folder with a folder for each modality, or a list
    .../new.txt of names beside such folders. A network of NTU takes NAME_rgb.avi, NAME_ir.avi and
    the depth folder NAME, one of NW-UCLA its folders. A network of arrays takes .npz
    files as those it was trained on, where label may be missing, or folders of such files. Nothing
    that the network was trained on is needed beside them."""
    index: tuple[int, ...] = ()
    """Samples of the data set by their places in --split, from 0, instead of files."""
    split: Literal["test", "validation", "train"] = "test"
    """Split that --index counts in, and that --scores takes the whole of where there are neither
    files nor --index."""
    scores: Path | None = None
    """CSV file to write every sample's probabilities of all classes to: a row per sample and stream
    with sample, label, stream, predicted, and a column per class."""
    top: int = 5
    """Classes to show for each stream."""
    output: Path = Path("predictions.png")
    """PNG file to draw in, the first 20 samples where there are more."""
    root: Path | None = None
    """Folder of the data set's files for --index and --split, where it is not the run's."""
    batch_size: int | None = None
    """Samples per step; when None, the run's. Another one can change a result in its last bits."""
    workers: int | None = None
    """Processes that load samples; when None, the run's."""
    device: str = "auto"
    """Device of the network, as PyTorch names it; auto is the run's or, where that cannot be used
    here, what there is, with a note."""
    precision: Precision | None = None
    """Autocast of the network's arithmetic; when None, the run's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 after a mistake of the user."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    options = tyro.cli(PredictOptions, prog=PROG, args=list(arguments))
    if options.files and options.index:
        raise UserError("give the files of a sample or more, or --index, not both")
    if not (options.files or options.index or options.scores):
        raise UserError(
            "give the files of a sample or more, --index, or --scores FILE.csv for all of --split"
        )
    if options.top < 1:
        raise UserError(f"--top must be 1 or more, but is {options.top}")
    path = options.checkpoint
    samples: Samples = "none" if options.files else "all"
    loader = options.batch_size, options.workers
    overrides = Overrides(options.root, *loader, options.device, options.precision)
    restored = restore(path, overrides, samples)
    tell_device(restored)
    classes = restored.data.classes
    if options.files:
        found = predictions.of_files(restored, path, options.files)
    else:
        found = predictions.of_split(restored, path, options.split, options.index or None)
    shown: list[Prediction] = []
    tally = predictions.Tally(len(classes))
    with scores.writing(options.scores, classes) if options.scores else nullcontext() as write:
        for prediction in tqdm(found, unit="sample", disable=not sys.stderr.isatty()):
            tally.add(prediction)
            if len(shown) < MOST_SHOWN:
                shown.append(prediction)
            if write is not None:
                write(prediction)
    print(predictions.describe(shown, classes, options.top))
    with user_errors():
        pictures.write(options.output, shown, restored.data, options.top)
    count = tally.samples
    first = "" if count <= MOST_SHOWN else f"the first {MOST_SHOWN} of {count} are shown here and "
    print(f"\n{first}drawn in {options.output}")
    if options.scores:
        print(f"the probabilities of all {count} are in {options.scores}")
    for line in tally.describe("files" if options.files else options.split):
        print(line)
    if not streams.heads_path(path).exists():
        print(
            "shown is the network's own prediction only: for each stream's too, run "
            f"python -m mmixer_kernels.evaluate {path} --streams first"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
