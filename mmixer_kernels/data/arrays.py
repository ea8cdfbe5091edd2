"""The user's own features: one array per modality in `train.npz` and `test.npz`.

`ROOT/train.npz`, `ROOT/test.npz` and, if there is one, `ROOT/validation.npz` each hold

- an array `[samples, T, D]` for each of two or more modalities, under the modality's name; T may
  differ between files, D may not;
- `label [samples]`, integers: classes are numbered from 0, and each has a training sample unless
  they are named;
- optionally `length [samples]`, integers in 1..T: steps past it are padding and are not read;
- optionally `classes [K]`, strings: the classes' names, which `train.npz` gives for all files.

They are read without pickle and kept in memory as float32. Samples to predict are files like
these with any name, in which `label` may be missing.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .base import UNKNOWN, Data, Moments, Sample, Split, held_out
from .standardize import Standardize

RESERVED = ("label", "length", "classes")
PART = 1024
"""Samples that are standardized at a time."""


@dataclass(frozen=True)
class ArraysOptions:
    """The data set `arrays`: the user's own features."""

    validation_share: float = 0.1
    """Share of each class's training samples that is held out, by the seed, to validate on when
    there is no validation.npz; never from the test set."""
    standardize: bool = True
    """Bring each feature to mean 0 and standard deviation 1 over the training samples' steps; one
    that never changes there to mean 0 alone."""

    recipe: ClassVar[dict[str, object]] = {}

    def load(self, root: Path | None, seed: int) -> Data:
        """Reads and checks the files under `root`.

        Raises:
            ValueError: no root, an option out of its range, or arrays that are not as this
                module's documentation has them.
            FileNotFoundError: train.npz or test.npz is missing.
            OSError: a file that cannot be read.
        """
        if root is None:
            raise ValueError(
                "root must be the folder of train.npz and test.npz, but is not given: pass --root"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must be between 0 and 1, but is {self.validation_share}"
            )
        train = _read(_part(root, "train.npz"))
        known = Known(train.path, _sizes(train), train.classes)
        test = _read(_part(root, "test.npz"), known)
        if (root / "validation.npz").exists():
            validation = _read(root / "validation.npz", known)
        else:
            train, validation = _hold_out(train, self.validation_share, seed)
        moments = None
        if self.standardize:
            moments = _moments(train)
            train, validation, test = (
                _standardized(arrays, moments) for arrays in (train, validation, test)
            )
        sizes = tuple(known.sizes.values())
        return Data(
            modalities=tuple(train.features),
            classes=train.classes,
            train=ArraysSplit(train),
            validation=ArraysSplit(validation),
            test=ArraysSplit(test),
            extractors=[nn.Identity() for _ in sizes],
            feature_sizes=sizes,
            moments=moments,
        )

    def samples_of(self, files: Sequence[Path], data: Data, source: Path) -> list[ArraysSplit]:
        """The samples of each file, for a network that knows `data`; the label of those without
        one is UNKNOWN.

        Args:
            files: npz files, and folders in which every npz file is read, in the order of names.
            data: without samples; with `moments` where the features were standardized.
            source: the checkpoint that remembers `data`, to be named in messages.

        Raises:
            ValueError: arrays that are not as this module's documentation has them, other
                modalities or sizes than those of `data`, or no moments.
            FileNotFoundError: a file that is not there, or a folder without any.
            OSError: a file that cannot be read.
        """
        if self.standardize and data.moments is None:
            raise ValueError(
                f"{source} does not tell by which mean and deviation --standardize brought its "
                "features, for an older version wrote it: train it anew"
            )
        assert data.feature_sizes is not None
        sizes = dict(zip(data.modalities, data.feature_sizes, strict=True))
        known = Known(source, sizes, data.classes)
        read = [_read(path, known, labelled=False) for path in _expanded(files)]
        if data.moments is not None:
            read = [_standardized(arrays, data.moments) for arrays in read]
        return [ArraysSplit(arrays) for arrays in read]


@dataclass(frozen=True)
class Arrays:
    """A file's content.

    Shapes: `features` `[samples, T, D]` float32 by modality; `labels`, `lengths` [samples] int64.
    """

    path: Path
    features: dict[str, Tensor]
    labels: Tensor
    lengths: Tensor
    classes: tuple[str, ...]

    def valid(self) -> Tensor:
        """`[samples, T]`: which steps are not padding."""
        steps = next(iter(self.features.values())).shape[1]
        return torch.arange(steps) < self.lengths[:, None]


class ArraysSplit(Split):
    """Samples cut to their lengths."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays.labels)
        self.arrays = arrays

    def __getitem__(self, index: int) -> Sample:
        length = int(self.arrays.lengths[index])
        inputs = tuple(features[index, :length] for features in self.arrays.features.values())
        return Sample(inputs, int(self.labels[index]), length)


class Known(NamedTuple):
    """The properties that further files must share: `sizes` has D by modality; `source` is the file
    or checkpoint that they are from."""

    source: Path
    sizes: dict[str, int]
    classes: tuple[str, ...]


def _sizes(arrays: Arrays) -> dict[str, int]:
    return {name: features.shape[-1] for name, features in arrays.features.items()}


def _part(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: root must be the folder of train.npz and test.npz"
        )
    return path


def _expanded(files: Sequence[Path]) -> list[Path]:
    """The npz files that are given, one by one and by their folders."""
    found: list[Path] = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist")
        inside = sorted(file.glob("*.npz")) if file.is_dir() else [file]
        if not inside:
            raise FileNotFoundError(f"{file} must hold a file .npz or more, but has none")
        found += inside
    return found


def _read(path: Path, known: Known | None = None, labelled: bool = True) -> Arrays:
    """The arrays of a file, checked; also against `known`, which files must share.

    Args:
        labelled: False where 'label' may be missing, and the labels are then UNKNOWN.
    """
    arrays = _load(path)
    names = [key for key in arrays if key not in RESERVED]
    for name in names:
        _check_features(path, name, arrays[name])
    if known is not None:
        _check_modalities(path, arrays, names, known)
        names = list(known.sizes)
    elif len(names) < 2:
        raise ValueError(
            f"{path}: must have an array [samples, T, D] for two modalities or more, "
            f"but has {', '.join(names) or 'none'}"
        )
    samples, steps = arrays[names[0]].shape[:2]
    for name in names:
        if arrays[name].shape[:2] != (samples, steps):
            raise ValueError(
                f"{path}: modalities must agree in samples and T, but {names[0]!r} has shape "
                f"{list(arrays[names[0]].shape)} and {name!r} {list(arrays[name].shape)}: bring "
                "them to the same steps, as by numpy.interp along the time"
            )
    if "label" in arrays:
        labels = _integers(path, "label", arrays["label"], samples)
        classes = _classes(path, arrays, labels) if known is None else known.classes
        named = "classes" in arrays and _named(path, arrays["classes"])
        if known is not None and named and named != known.classes:
            raise ValueError(
                f"{path}: 'classes' must be those of {known.source}, for labels are their places, "
                "but differs: leave it out where the labels are right"
            )
        _check_values(path, "label", labels, 0, len(classes) - 1)
    elif labelled or known is None:
        raise ValueError(f"{path}: 'label' [samples] is missing; it has {', '.join(arrays)}")
    else:
        labels, classes = torch.full((samples,), UNKNOWN), known.classes
    lengths = torch.full((samples,), steps)
    if "length" in arrays:
        lengths = _integers(path, "length", arrays["length"], samples)
        _check_values(path, "length", lengths, 1, steps)
    with np.errstate(over="ignore"):
        features = {
            name: torch.from_numpy(arrays[name].astype(np.float32, copy=False)) for name in names
        }
    result = Arrays(path, features, labels, lengths, classes)
    _check_finite(result)
    return result


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, Mapping):
                raise ValueError("it holds one array without a name")
            return {key: np.asarray(value) for key, value in file.items()}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(
            f"{path} must be a file as numpy.savez writes it, with no Python objects in it, "
            f"but cannot be read: {error}"
        ) from error


def _check_features(path: Path, key: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {key!r} must be numbers, but has dtype {array.dtype}")
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"{path}: {key!r} must be [samples, T, D], none of them 0, "
            f"but has shape {list(array.shape)}"
        )


def _check_modalities(
    path: Path, arrays: dict[str, np.ndarray], names: list[str], known: Known
) -> None:
    if set(names) != known.sizes.keys():
        raise ValueError(
            f"{path}: modalities must be those of {known.source}, {', '.join(known.sizes)}, "
            f"but are {', '.join(names) or 'none'}"
        )
    for name, size in known.sizes.items():
        if arrays[name].shape[-1] != size:
            raise ValueError(
                f"{path}: {name!r} must have D = {size} as in {known.source}, "
                f"but has shape {list(arrays[name].shape)}"
            )


def _integers(path: Path, key: str, array: np.ndarray, samples: int) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key!r} must be integers, but has dtype {array.dtype}")
    if array.shape != (samples,):
        raise ValueError(
            f"{path}: {key!r} must be [samples] = [{samples}], but has shape {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _check_values(path: Path, key: str, values: Tensor, least: int, most: int) -> None:
    bad = (values < least) | (values > most)
    if bad.any():
        sample = int(bad.nonzero()[0])
        raise ValueError(
            f"{path}: {key!r} must be in {least}..{most}, "
            f"but is {int(values[sample])} for sample {sample}"
        )


def _check_finite(arrays: Arrays) -> None:
    for name, features in arrays.features.items():
        bad = (~features.isfinite().all(-1) & arrays.valid()).nonzero()
        if len(bad):
            sample, step = bad[0].tolist()
            raise ValueError(
                f"{arrays.path}: {name!r} must be finite in float32, but has NaN or an infinity in "
                f"{len(bad[:, 0].unique())} of {len(features)} samples, first in sample {sample} "
                f"at step {step}"
            )


def _classes(path: Path, arrays: dict[str, np.ndarray], labels: Tensor) -> tuple[str, ...]:
    """The names of the classes, after a check that each has a sample where they are not named."""
    if int(labels.min()) < 0:
        sample = int((labels < 0).nonzero()[0])
        raise ValueError(
            f"{path}: 'label' must be 0 or more, but is {int(labels[sample])} for sample {sample}"
        )
    if "classes" in arrays:
        return _named(path, arrays["classes"])
    names = np.arange(int(labels.max()) + 1).astype(str)
    missing = sorted(set(range(len(names))) - set(labels.tolist()))
    if missing:
        raise ValueError(
            f"{path}: 'label' must have each class in 0..{len(names) - 1}, but no sample has "
            f"{', '.join(map(str, missing))}: number the classes from 0 without gaps"
        )
    return tuple(names.tolist())


def _named(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(
            f"{path}: 'classes' must be strings [K], "
            f"but has dtype {names.dtype} and shape {list(names.shape)}"
        )
    return tuple(names.tolist())


def _hold_out(train: Arrays, share: float, seed: int) -> tuple[Arrays, Arrays]:
    """Training and validation samples; validation gets its share of each class that has two samples
    or more, and at least one of them."""
    held = held_out(train.labels, share, seed)
    if not held.any():
        raise ValueError(
            f"{train.path}: no class has two samples, so none can be held out for validation: "
            f"provide {train.path.with_name('validation.npz')}"
        )
    return _select(train, ~held), _select(train, held)


def _select(arrays: Arrays, mask: Tensor) -> Arrays:
    features = {name: tensor[mask] for name, tensor in arrays.features.items()}
    labels, lengths = arrays.labels[mask], arrays.lengths[mask]
    return Arrays(arrays.path, features, labels, lengths, arrays.classes)


def _moments(train: Arrays) -> Moments:
    """Each modality's mean and standard deviation, `[D]`, 1 where a feature never changes."""
    moments = {}
    for name, features in train.features.items():
        steps = features[train.valid()].double()
        mean, deviation = steps.mean(0), steps.std(0, correction=0)
        changes = deviation > torch.finfo(torch.float32).eps * mean.abs()
        moments[name] = mean.tolist(), torch.where(changes, deviation, 1.0).tolist()
    return moments


def _standardized(arrays: Arrays, moments: Moments) -> Arrays:
    standardize, features = Standardize(tuple(arrays.features), moments), {}
    for i, (name, tensor) in enumerate(arrays.features.items()):
        # Part by part: a whole set in float64 would take twice its memory again.
        features[name] = torch.cat([standardize.of(i, part) for part in tensor.split(PART)])
    return Arrays(arrays.path, features, arrays.labels, arrays.lengths, arrays.classes)
