"""A data set's features, as the data set `arrays` reads them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..atomic import replacing
from ..data import Data, Split
from ..errors import DamagedFile, UserError
from ..training import batches, run
from ..training.model import Recognizer
from ..training.options import LoaderOptions, Options
from .restore import Restored


class Extracted(NamedTuple):
    """A file of features `[samples, steps, D]`, one array per modality."""

    path: Path
    """The file."""
    samples: int
    """The number of samples in it."""
    steps: int
    """T, the steps of the longest."""


def of_checkpoint(restored: Restored, output: Path) -> list[Extracted]:
    """Writes the features that a trained network's extractors make of its data set, as `extract`.

    Raises:
        UserError: also where there is nothing to extract: the inputs are features already.
    """
    if all(isinstance(extractor, nn.Identity) for extractor in restored.model.extractors):
        raise UserError(
            f"the samples of {restored.options.run.data} are features already: there is nothing "
            "to extract"
        )
    return extract(restored.model, restored.data, restored.options.run.loader, output)


def of_pretrained(options: Options, output: Path) -> list[Extracted]:
    """Writes the features that the options' pretrained networks make of a data set of frames, as
    `extract`.

    Raises:
        UserError: also where the weights cannot be had, or the data set is not one of frames.
    """
    _check_output(output)
    torch.manual_seed(options.run.seed)
    data, recognizer, _ = run.build(options, run.device_of(options.run.device), initial=True)
    if data.extractors is not None:
        raise UserError(
            f"the extractors of {options.run.data} are no networks of frames, which have weights "
            "before training: give the checkpoint of a run"
        )
    return extract(recognizer, data, options.run.loader, output)


def extract(
    recognizer: Recognizer, data: Data, loader: LoaderOptions, output: Path
) -> list[Extracted]:
    """Writes train.npz, validation.npz and test.npz, without augmentation.

    They are written in a folder beside and take their place together. Memory holds one batch at
    a time: features wait in a temporary file per modality until the longest sample is known.

    Args:
        recognizer: the network whose extractors are used.
        data: the data set.
        loader: the size of a batch, and the workers.
        output: the folder to make; it may exist when it is empty.

    Raises:
        UserError: `output` has something in it, or a sample or file cannot be read or written.
    """
    _check_output(output)
    beside = output.with_name(output.name + ".part")
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    written = []
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, split in splits.items():
            if len(split):
                written.append(_write(beside / f"{name}.npz", recognizer, data, split, loader))
        os.replace(beside, output)
    except (DamagedFile, OSError) as error:
        raise UserError(str(error)) from error
    return [extracted._replace(path=output / extracted.path.name) for extracted in written]


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} must be a new or empty folder: choose another one")


@torch.no_grad()
def _write(
    path: Path, recognizer: Recognizer, data: Data, split: Split, loader: LoaderOptions
) -> Extracted:
    recognizer.eval()
    device = next(recognizer.parameters()).device
    labels: list[int] = []
    lengths: list[int] = []
    with ExitStack() as stack:
        spools = [
            stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in data.modalities
        ]
        bar = stack.enter_context(
            tqdm(total=len(split), desc=path.stem, unit="sample", disable=not sys.stderr.isatty())
        )
        for inputs, batch_labels, batch_lengths in batches.batches_in_order(
            split.plain(), loader, device
        ):
            features = [x.float().cpu().numpy() for x in recognizer.features(inputs, batch_lengths)]
            steps = [features[0].shape[1]] * len(batch_labels)
            if batch_lengths is not None:
                steps = batch_lengths.tolist()
            for spool, sequences in zip(spools, features, strict=True):
                for sequence, length in zip(sequences, steps, strict=True):
                    spool.write(sequence[:length].tobytes())
            labels += batch_labels.tolist()
            lengths += steps
            bar.update(len(steps))
        file = stack.enter_context(replacing(path))
        archive = stack.enter_context(zipfile.ZipFile(file, "w"))
        for modality, spool, size in zip(
            data.modalities, spools, recognizer.mixer.feature_sizes, strict=True
        ):
            with archive.open(f"{modality}.npy", "w", force_zip64=True) as member:
                _pad(spool, member, lengths, size)
        for key, array in (
            ("label", np.array(labels)),
            ("length", np.array(lengths)),
            ("classes", np.array(data.classes)),
        ):
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return Extracted(path, len(lengths), max(lengths))


def _pad(spool: IO[bytes], member: IO[bytes], lengths: Sequence[int], size: int) -> None:
    """Writes sequences `[length, size]` float32, one after another in `spool`, as an array
    `[samples, T, size]`."""
    steps = max(lengths)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (len(lengths), steps, size),
    }
    np.lib.format.write_array_header_1_0(member, header)
    spool.seek(0)
    step = 4 * size
    for length in lengths:
        member.write(spool.read(length * step).ljust(steps * step, b"\0"))
