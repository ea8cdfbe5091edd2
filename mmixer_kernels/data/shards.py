"""The converted form of a video data set: sampled, resized frames in tar shards beside an index.

A folder that `python -m mmixer_kernels.prepare` wrote holds

- `shard-000000.tar`, ...: for each sample `NAME.json` (its name, label and, by modality, the frames
  of the original and, where modalities are aligned by their rates, these) and a picture per stored
  frame, `NAME.rgb.00008.jpg`, numbered as in the original. Colour and grey pictures are JPEG;
  values, as depth, are PNG of 8 or 16 bits and unchanged. The library webdataset can read them too.
- `shard-000000.json`, ...: the place and checksum of each picture, and what was missing or damaged.
- `conversion.json`: what was asked for.
- `index.json`: the classes, the shards with their checksums and, for a data set whose lists say so,
  the part that each sample belongs to. It comes last: where it is missing, the conversion has not
  ended.
- `report.json`: what the last run did.

Training reads pictures by their places, in any order, and every split of the data set is made of
the same folder.
"""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DamagedFile
from . import images
from .alignment import Rule, Track
from .clips import Clip
from .images import KINECT, Form
from .transforms import Sampling

FORMAT = 1
OPEN_FILES = 256
"""Shards that a process keeps open; the least recently used one is closed."""
VERIFY = "python -m mmixer_kernels.prepare --verify --output"


@dataclass(frozen=True)
class Conversion:
    """The options that decide the contents of a converted folder, beside the raw files."""

    data: str
    """The data set's name."""
    modalities: tuple[str, ...]
    sampling: Mapping[str, int]
    """`sampling_options` of the sampling: {"stride": 8} or {"frames": 16}."""
    size: int
    """Pixels of the frames' shorter side."""
    quality: int
    """Quality of the JPEGs, 1 to 100."""
    samples_per_shard: int
    source: Mapping[str, Any]
    """Options of the data set that decide which files are read."""
    format: int = FORMAT
    forms: Mapping[str, Form] | None = None
    """The forms of the frames by modality; None for those of a Kinect, images.KINECT."""
    align: Rule = "frame"
    """The rule that tells which frames of the modalities belong together."""

    @classmethod
    def read(cls, folder: Path) -> Conversion:
        """The conversion of a folder; ValueError where this version cannot read it."""
        path = folder / "conversion.json"
        table = read_json(path)
        known = {item.name for item in fields(cls)}
        if table.get("format") != FORMAT or not known - set(OPTIONAL) <= table.keys() <= known:
            raise ValueError(
                f"{path} must have format {FORMAT}, but has {table.get('format')}: convert the "
                "data set again, into another folder"
            )
        return cls(**{**table, "modalities": tuple(table["modalities"])})

    def sampled(self) -> Sampling:
        """The sampling that the options describe."""
        return Sampling(**self.sampling)

    def form(self, modality: str) -> Form:
        """The form of a modality's frames."""
        return KINECT[modality] if self.forms is None else self.forms[modality]

    def table(self) -> dict[str, Any]:
        """The options in JSON's types, without those that older versions do not know where they are
        at their defaults."""
        table = {**asdict(self), "modalities": list(self.modalities)}
        return {
            name: value
            for name, value in table.items()
            if name not in OPTIONAL or value != OPTIONAL[name]
        }


OPTIONAL = {"forms": None, "align": "frame"}
"""The options that conversions of older versions lack, with their defaults."""


def sampling_options(sampling: Sampling) -> dict[str, int]:
    """The options of a sampling that decide it: {"stride": 8} or {"frames": 16}."""
    if sampling.frames is not None:
        return {"frames": sampling.frames}
    return {"stride": sampling.stride}


def tracks_of(sample: Mapping[str, Any]) -> dict[str, Track]:
    """The numbers of frames and the rates by modality, of a sample in a shard's table."""
    rates = sample.get("rates", {})
    return {name: Track(count, rates.get(name)) for name, count in sample["frames"].items()}


@dataclass(frozen=True)
class Shard:
    """A tar file of pictures.

    Args:
        path: the file.
        sha256: its checksum in the index.
    """

    path: Path
    sha256: str

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends before."""
        # pread has no position that processes after a fork could share.
        return os.pread(_opened(self.path, self.sha256).descriptor, length, offset)


@dataclass(frozen=True)
class ShardSource:
    """A `Source` of the pictures of one modality of a sample.

    Args:
        shard: the file that they are in.
        name: the sample's name.
        modality: the modality's name.
        form: the form of its frames.
        track: number of frames of the original and, where it is stored, its rate.
        size: pixels of the pictures' shorter side.
        places: int64 `[n, 4]`, a row per picture, ascending: its number in the original, and the
            offset, length and CRC-32 of its bytes.
    """

    shard: Shard
    name: str
    modality: str
    form: Form
    track: Track
    size: int
    places: np.ndarray

    def count(self) -> int:
        """The number of frames of the original."""
        return self.track.frames

    def rate(self) -> float | None:
        """The original's frames per second, None where they were not needed."""
        return self.track.rate

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """The pictures of these frames of the original, as `Source.read` has them.

        Raises:
            DamagedFile: bytes that do not have their checksum, or are no picture.
            ValueError: a frame that was not stored, or another size.
        """
        if size != self.size:
            raise ValueError(
                f"{self.shard.path}: its frames have a shorter side of {self.size} pixels, but "
                f"{size} is asked for: convert the data set with --size {size}"
            )
        places = {index: place for index, *place in self.places.tolist()}
        pictures = {}
        for index in sorted(set(indices)):
            if index not in places:
                raise ValueError(
                    f"{self.shard.path}: frame {index} of {self.name} was not stored: the frames "
                    f"of {self.modality} are {', '.join(map(str, places))}"
                )
            content = self._bytes(index, *places[index])
            try:
                pictures[index] = images.decode(content, self.form)
            except ValueError as error:
                member = member_name(self.name, self.modality, index, self.form)
                raise DamagedFile(self.shard.path, f"{member} {error}") from error
        return torch.stack([pictures[index] for index in indices])

    def verify(self, full: bool) -> None:
        """Compares the pictures with their checksums, where `full`.

        Raises:
            DamagedFile: they differ.
        """
        if full:
            for place in self.places.tolist():
                self._bytes(*place)

    def _bytes(self, index: int, offset: int, length: int, checksum: int) -> bytes:
        data = self.shard.read(offset, length)
        if zlib.crc32(data) != checksum:
            member = member_name(self.name, self.modality, index, self.form)
            raise DamagedFile(
                self.shard.path,
                f"{member} does not have the checksum of the index: {VERIFY} "
                f"{self.shard.path.parent} finds what is damaged",
            )
        return data


class Converted(NamedTuple):
    """The contents of a converted folder: samples, the raw form's notes, the names of the classes,
    the samples' names by part where lists tell them, and the forms by modality."""

    clips: list[Clip]
    notes: list[str]
    classes: tuple[str, ...]
    parts: Mapping[str, Sequence[str]] | None
    forms: Mapping[str, Form]


def is_converted(folder: Path) -> bool:
    """True where a folder holds the converted form, or a part of it."""
    return (folder / "conversion.json").exists()


def clips(
    root: Path,
    data: str,
    modalities: Sequence[str],
    sampling: Sampling,
    size: int,
    source: Mapping[str, Any],
    align: Rule = "frame",
) -> Converted | None:
    """The samples of a converted folder, in the order of the raw form, each with those of the
    modalities that it has; None where the folder is not converted.

    Args:
        data: the data set's name.
        modalities: some or all of the converted ones.
        sampling: the one that the folder was converted with.
        size: pixels of the frames' shorter side.
        source: options of the data set that decide which files these modalities are read from.
        align: the rule that the modalities are aligned by.

    Raises:
        ValueError: the conversion has not ended, it was another one than is asked for, or its
            files are not those of the index.
        OSError: a file that cannot be read.
    """
    if not is_converted(root):
        return None
    conversion = Conversion.read(root)
    asked = {**sampling_options(sampling), **source, "align": align}
    _check(root, conversion, data, modalities, size, asked)
    index = read_index(root)
    found = []
    for entry in index["shards"]:
        _check_sizes(root, entry)
        shard = Shard(root / f"{entry['name']}.tar", entry["sha256"])
        for sample in read_json(root / f"{entry['name']}.json")["samples"]:
            found.append(_clip(shard, sample, modalities, conversion))
    forms = {modality: conversion.form(modality) for modality in modalities}
    return Converted(found, index["notes"], tuple(index["classes"]), index.get("parts"), forms)


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of index.json; ValueError where the conversion has not ended."""
    path = folder / "index.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no index.json: its conversion has not ended, and goes on when "
            "python -m mmixer_kernels.prepare is run again with the same options"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file where it holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object")
    return table


def dumps(table: Mapping[str, Any]) -> bytes:
    """A JSON object as one line of text."""
    return (json.dumps(table, separators=(",", ":")) + "\n").encode()


def member_name(name: str, modality: str, index: int, form: Form) -> str:
    """A picture's name in its shard; webdataset takes what is before the first dot as the key."""
    return f"{name}.{modality}.{index:05}.{images.FORMS[form].extension}"


class ShardWriter:
    """Writes a shard's samples into an open file; equal samples give equal bytes."""

    def __init__(self, file: IO[bytes], conversion: Conversion) -> None:
        self.file, self.conversion = file, conversion
        self.tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        label: int,
        tracks: Mapping[str, Track],
        pictures: Mapping[str, Mapping[int, bytes]],
    ) -> None:
        """Adds a sample: the original's number of frames, with their rate where that counts, and
        the encoded pictures by modality."""
        about: dict[str, Any] = {
            "name": name,
            "label": label,
            "frames": {modality: track.frames for modality, track in tracks.items()},
        }
        if self.conversion.align == "rate":
            about["rates"] = {modality: track.rate for modality, track in tracks.items()}
        self._add(f"{name}.json", dumps(about))
        places = {}
        for modality, frames in pictures.items():
            form = self.conversion.form(modality)
            places[modality] = [
                [index, *self._add(member_name(name, modality, index, form), data)]
                for index, data in sorted(frames.items())
            ]
        self.samples.append({**about, "places": places})

    def close(self) -> None:
        """Ends the archive; the file stays open."""
        self.tar.close()

    def _add(self, name: str, data: bytes) -> tuple[int, int, int]:
        """Adds a member, and gives the offset, length and CRC-32 of its bytes."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        offset = self.file.tell() + tarfile.BLOCKSIZE
        try:
            self.tar.addfile(member, io.BytesIO(data))
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be a file in a tar: {error}: shorten it") from error
        return offset, len(data), zlib.crc32(data)


class _OpenFile:
    """A file that is closed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, sha256: str) -> _OpenFile:
    """A shard's file, one per process; the checksum tells it from an older one of this name."""
    return _OpenFile(path)


def _clip(
    shard: Shard, sample: Mapping[str, Any], modalities: Sequence[str], conversion: Conversion
) -> Clip:
    name, tracks = sample["name"], tracks_of(sample)
    sources = {
        modality: ShardSource(
            shard,
            name,
            modality,
            conversion.form(modality),
            tracks[modality],
            conversion.size,
            np.array(sample["places"][modality], dtype=np.int64),
        )
        for modality in modalities
        if modality in tracks
    }
    return Clip(name, sample["label"], sources)


def _check(
    root: Path,
    conversion: Conversion,
    data: str,
    modalities: Sequence[str],
    size: int,
    asked: Mapping[str, Any],
) -> None:
    """Refuses a conversion of other files or frames than are asked for by these options."""
    if conversion.data != data:
        raise ValueError(
            f"--data {data} does not fit --root {root}, which was converted from "
            f"{conversion.data}: pass --data {conversion.data}, or the folder of {data}"
        )
    missing = [name for name in modalities if name not in conversion.modalities]
    if missing:
        raise ValueError(
            f"--modalities {' '.join(modalities)} must be among those that {root} was converted "
            f"with, {' '.join(conversion.modalities)}: leave out {' '.join(missing)}, or convert "
            "the data set again with all of them, into another folder"
        )
    if size != conversion.size:
        raise ValueError(
            f"frames with a shorter side of {size} pixels are asked for, but {root} was converted "
            f"with --size {conversion.size}: convert the data set with --size {size}, into another "
            "folder"
        )
    options = {**conversion.source, "align": conversion.align}
    stored = {
        **conversion.sampling,
        **{key: options.get(key) for key in asked if key not in ("stride", "frames")},
    }
    if asked != stored:
        now = _flags({key: value for key, value in asked.items() if stored.get(key) != value})
        then = _flags({key: value for key, value in stored.items() if asked.get(key) != value})
        raise ValueError(
            f"{now} does not fit --root {root}, which was converted with {then}: pass {then}, or "
            f"convert the data set again with {now}, into another folder"
        )


def _flags(options: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def _check_sizes(root: Path, entry: Mapping[str, Any]) -> None:
    for suffix, size in (("tar", entry["size"]), ("json", entry["json_size"])):
        path = root / f"{entry['name']}.{suffix}"
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"{path} must have {size} bytes as in index.json, but {state}: run "
                "python -m mmixer_kernels.prepare again, which makes damaged shards anew"
            )
