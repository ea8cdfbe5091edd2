"""A person's own recordings: a folder per modality, and lists of the samples.

    ROOT/train.txt, ROOT/test.txt, ...      the lists, as `lists` has them
    ROOT/MODALITY/NAME/                     numbered pictures, JPEG or PNG
    ROOT/MODALITY/NAME.avi                  or a video (mp4, mkv, webm, mov, ...)

A modality is any folder's name. Its frames have one form in the whole data set, which the first
sample tells: `16-bit` where it has PNGs (or a grey video) of 16 bits, `grey` where it has one
channel, and else `colour`; but `rgb` is always colour, `ir` grey where it is not 16-bit, and so is
`depth`, in the form `8-bit`, whose values are kept exactly. Files of `rgb`, `ir` and `depth` may
have three channels or one, for public data is stored either way; those of another modality must
have what the first sample has. Modalities are aligned by time, as `alignment` has it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ..errors import DamagedFile
from . import shards
from .alignment import Rule
from .arrays import RESERVED
from .base import held_out
from .clips import Clip, Source
from .decode import VIDEO_ENDINGS, NumberedPicturesSource, VideoSource, is_picture, require
from .images import KINECT, Form
from .lists import MOST_FAULTS, Lists, read_lists
from .transforms import Transform
from .video import Listing, VideoOptions, first

LISTS_FOLDER = "dataset_splits"
"""The folder of the lists where public code for RGB-D video expects them."""

Paths = dict[str, dict[str, str]]
"""Samples' files and folders by name and modality."""


@dataclass(frozen=True)
class ClipsOptions(VideoOptions):
    """The data set `clips`: a person's own recordings."""

    modalities: tuple[str, ...] = ("rgb", "depth")
    """Two or more modalities, by the names of their folders, in the order of a sample's inputs.
    --stride and --frames choose among the frames of the first."""
    lists: Path | None = None
    """Folder of train.txt, test.txt and the like; when None, --root or the folder dataset_splits
    in it."""
    validation_share: float = 0.1
    """Share of each class's training samples that is held out, by the seed, to validate on when
    there is no list for that; never from the test set."""
    align: Literal["span", "rate"] = "span"
    """Frames of the modalities that belong together: span where they begin and end together, rate
    where they begin together and frame k stands at k / rate."""
    rates: tuple[float, ...] | None = None
    """Frames per second of each modality, in their order, for --align rate. When None, those of the
    videos' headers; pictures have none."""
    sensor_maximum: int = 5000
    """Value of 16-bit pictures that --color-range fixed gives the map's last colour, as greater
    ones; of 8-bit pictures it is 255."""

    name = "clips"
    classes: ClassVar[tuple[str, ...]] = ()
    maximum: ClassVar[Mapping[str, int]] = {}

    def find(self, root: Path) -> Listing:
        require("av", "torchvision")
        found = self._lists(root)
        entries = [entry for part in found.parts.values() for entry in part]
        named = {entry.name: entry.listed.place for entry in entries}
        paths = files_of(root, self.modalities, named)
        unlisted = sorted(paths.keys() - named.keys())
        if unlisted:
            found.notes.append(f"{len(unlisted):,} samples are in no list: {first(unlisted)}")
        paths = {name: paths.get(name, {}) for name in sorted(named)}
        forms = forms_of(self.modalities, paths.values())
        sources = self.sources(paths, forms)
        clips = [
            Clip(entry.name, entry.label, sources[entry.name], entry.listed)
            for entry in sorted(entries)
        ]
        return Listing(clips, found.notes, found.classes, _names(found), forms)

    def of_converted(self, root: Path, converted: shards.Converted) -> Listing:
        for clip in converted.clips:
            self._check_rates(root, clip)
        if self.lists is None:
            return Listing(
                converted.clips,
                converted.notes,
                converted.classes,
                converted.parts,
                converted.forms,
            )
        found = self._lists(root)
        clips = {clip.name: clip for clip in converted.clips}
        entries = sorted(entry for part in found.parts.values() for entry in part)
        chosen = [
            replace(
                clips.get(entry.name, Clip(entry.name, entry.label, {})),
                label=entry.label,
                listed=entry.listed,
            )
            for entry in entries
        ]
        return Listing(chosen, found.notes, found.classes, _names(found), converted.forms)

    def sources(self, paths: Paths, forms: Mapping[str, Form]) -> dict[str, dict[str, Source]]:
        """The sources of samples' files, by name and modality.

        Raises:
            ValueError: pictures, which have no frame rate, are to be aligned by it.
        """
        rates = dict(zip(self.modalities, self.rates or [None] * len(self.modalities), strict=True))
        sources: dict[str, dict[str, Source]] = {}
        for name, of_modalities in paths.items():
            sources[name] = {}
            for modality in self.modalities:
                path, rate = of_modalities.get(modality), rates[modality]
                if path is None:
                    continue
                source = _source(path, forms[modality], modality not in KINECT, rate)
                if self.align == "rate" and rate is None and os.path.isdir(path):
                    raise ValueError(
                        f"{path} has pictures, which do not tell their frame rate: pass --rates, "
                        f"the frames per second of {', '.join(self.modalities)}, or --align span"
                    )
                sources[name][modality] = source
        return sources

    def rule(self) -> Rule:
        return self.align

    def parts(self, listing: Listing, seed: int) -> dict[str, list[Clip]]:
        """The clips of each of PARTS.

        Where no list names samples to validate on, they are held out of the training samples,
        complete or not, so that the choice of the modalities does not change them.

        Raises:
            ValueError: no class has two training samples, one of which could be held out.
        """
        assert listing.parts is not None
        part_of = {name: part for part, names in listing.parts.items() for name in names}
        parts: dict[str, list[Clip]] = {"train": [], "validation": [], "test": []}
        for clip in listing.clips:
            parts[part_of[clip.name]].append(clip)
        if "validation" in listing.parts:
            return parts
        train = parts["train"]
        labels = torch.tensor([clip.label for clip in train], dtype=torch.int64)
        held = held_out(labels, self.validation_share, seed).tolist()
        if not any(held):
            raise ValueError(
                "no class has two training samples, so that none can be held out for validation: "
                "provide validation.txt"
            )
        parts["train"] = [clip for clip, out in zip(train, held, strict=True) if not out]
        parts["validation"] = [clip for clip, out in zip(train, held, strict=True) if out]
        return parts

    def _lists(self, root: Path) -> Lists:
        if self.lists is not None:
            return read_lists(self.lists)
        inside = root / LISTS_FOLDER
        return read_lists(inside if inside.is_dir() and not (root / "train.txt").exists() else root)

    def _check(self) -> None:
        names = self.modalities
        well_named = all(name.replace("-", "").replace("_", "").isalnum() for name in names)
        reserved = set(names) & set(RESERVED)  # in the arrays that `extract` writes
        if len(names) < 2 or len(set(names)) < len(names) or not well_named or reserved:
            raise ValueError(
                "modalities must be two or more names of folders, each once, of letters, digits, "
                f"- and _, and not {' or '.join(RESERVED)}, but are {' '.join(names)!r}"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must be between 0 and 1, but is {self.validation_share}"
            )
        if self.rates is not None and (
            self.align != "rate" or len(self.rates) != len(names) or not min(self.rates) > 0
        ):
            raise ValueError(
                f"rates must be a number above 0 for each of {' '.join(names)}, with --align rate, "
                f"but are {' '.join(map(str, self.rates))} with --align {self.align}"
            )
        if self.sensor_maximum < 1:
            raise ValueError(f"sensor_maximum must be 1 or more, but is {self.sensor_maximum}")
        super()._check()

    def _check_modalities(self) -> None:
        """Any folders' names are modalities."""

    def _check_rates(self, root: Path, clip: Clip) -> None:
        """Refuses other rates than those that a clip was converted with."""
        for modality, rate in zip(self.modalities, self.rates or (), strict=False):
            stored = clip.sources[modality].rate() if modality in clip.sources else rate
            if stored != rate:
                raise ValueError(
                    f"--rates has {rate:g} for {modality}, but {root} was converted with "
                    f"{stored:g}: leave --rates out, or convert the data set again"
                )

    def _transform(self) -> Transform:
        fixed = self.color_range == "fixed"
        maximum = dict.fromkeys(self.modalities, self.sensor_maximum) if fixed else {}
        return Transform(self.image_size, self.flip, self.jitter, maximum)


def files_of(
    root: Path, modalities: Sequence[str], listed: Mapping[str, str] | None = None
) -> Paths:
    """The files and folders of samples under a folder that has one for each modality.

    Args:
        listed: names of samples, each with the place in a list that names it. Folders of these
            names are samples; others are where they have pictures.

    Raises:
        FileNotFoundError: a modality has no folder.
        ValueError: a sample of a modality is there twice.
    """
    found: Paths = {}
    twice = []
    for modality in modalities:
        folder = root / modality
        if not folder.is_dir():
            there = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise FileNotFoundError(
                f"{root} has no folder {modality}, but {', '.join(there) or 'none'}: --modalities "
                "must be names of folders in it"
            )
        for name, path in _walk(str(folder), listed or {}):
            of_modalities = found.setdefault(name, {})
            if modality in of_modalities:
                place = f" ({listed[name]})" if listed and name in listed else ""
                twice.append(
                    f"the {modality} of {name}{place} is there twice, {of_modalities[modality]} "
                    f"and {path}: remove one"
                )
            of_modalities[modality] = path
    if twice:
        more = f"; and {len(twice) - MOST_FAULTS:,} more" if len(twice) > MOST_FAULTS else ""
        raise ValueError("; ".join(twice[:MOST_FAULTS]) + more)
    return found


def forms_of(modalities: Iterable[str], samples: Collection[Mapping[str, str]]) -> dict[str, Form]:
    """The form of each modality's frames, as this module's documentation has it; of one without
    a readable file the form that a Kinect's has.

    Args:
        samples: the samples' paths by modality.
    """
    return {
        modality: _form(modality, (paths[modality] for paths in samples if modality in paths))
        for modality in modalities
    }


def _form(modality: str, paths: Iterable[str]) -> Form:
    for path in paths:
        try:
            stored = _source(path, "colour", False, None).stored_form()
        except DamagedFile:
            continue  # named where it is read
        if modality == "rgb":
            return "colour"
        if stored == "16-bit" or modality not in KINECT:
            return stored
        return "8-bit" if modality == "depth" else "grey"
    return KINECT.get(modality, "colour")


def _source(
    path: str, form: Form, strict: bool, rate: float | None
) -> NumberedPicturesSource | VideoSource:
    kind = NumberedPicturesSource if os.path.isdir(path) else VideoSource
    return kind(path, form, strict, rate)


def _walk(folder: str, listed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the name and path of each sample: videos, and folders that are listed or have
    pictures."""
    folders = [""]
    while folders:
        inside = folders.pop()
        has_pictures = False
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                name = inside + entry.name
                stem, ending = os.path.splitext(name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if name in listed:
                        yield name, entry.path
                    else:
                        folders.append(f"{name}/")
                elif ending.lower() in VIDEO_ENDINGS:
                    yield stem, entry.path
                else:
                    has_pictures = has_pictures or is_picture(entry.name)
        if has_pictures and inside:
            yield inside[:-1], os.path.join(folder, inside[:-1])


def _names(found: Lists) -> dict[str, list[str]]:
    return {part: sorted(entry.name for entry in entries) for part, entries in found.parts.items()}
