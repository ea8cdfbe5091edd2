"""The common part of the data sets of video: their options, and the way from files to the three
splits."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from . import shards
from .alignment import Rule
from .base import Data
from .clips import Clip, ClipSplit
from .images import Form
from .transforms import Sampling, Transform

PARTS = ("train", "validation", "test")


class Listing(NamedTuple):
    """A data set's samples on disk: `clips` in the order of their names, each with those of the
    chosen modalities that were found; `notes`, what was left out and why, a line each.

    Where the data set's own options do not tell them: `classes`, the classes' names; `parts`, the
    samples' names by part as lists have them; `forms`, the forms of the frames by modality.
    """

    clips: list[Clip]
    notes: list[str]
    classes: tuple[str, ...] = ()
    parts: Mapping[str, Sequence[str]] | None = None
    forms: Mapping[str, Form] | None = None


@dataclass(frozen=True)
class VideoOptions:
    """The options that the data sets of video share."""

    modalities: tuple[str, ...] = ("rgb", "depth")
    """Two or more modalities, in the order of a sample's inputs."""
    allow_missing: bool = False
    """Test without the samples that lack a modality, which is an error otherwise; --check then
    allows missing samples too. They are reported."""
    stride: int = 8
    """Distance in frames from one that is read to the next, so that clips differ in length; the
    default is the paper's."""
    frames: int | None = None
    """Number of frames to read of each clip instead, evenly spaced; short clips repeat some."""
    image_size: int = 224
    """Height and width of the network's frames in pixels."""
    color_range: Literal["frame", "fixed"] = "frame"
    """Range that the jet map of one channel, as depth and IR, spreads over: each frame's least to
    greatest value, or 0 to the sensor's maximum."""
    flip: float = 0.5
    """Probability of mirroring a training clip."""
    jitter: float = 0.4
    """Share by which brightness, contrast and saturation of colours vary in training."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    maximum: ClassVar[Mapping[str, int]]
    """The sensors' greatest values, by modality the data set has, for --color-range fixed."""
    validation_hint: ClassVar[str] = ""
    """Advice where no sample is left to validate on."""
    recipe: ClassVar[dict[str, object]] = {
        "model.hidden_size": 512,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 1e-4,
        "loader.batch_size": 8,
    }

    def find(self, root: Path) -> Listing:
        """The samples under `root`, found in one pass over its folders without opening files."""
        raise NotImplementedError

    def part(self, name: str) -> str:
        """The one of PARTS that the sample of this name belongs to."""
        raise NotImplementedError

    def rule(self) -> Rule:
        """The rule that tells which frames of the modalities belong together."""
        return "frame"

    def published(self) -> dict[str, int]:
        """Samples of "train" (validation included) and "test" when nothing is missing; none where
        publications differ."""
        return {}

    def source(self) -> dict[str, str]:
        """The options that decide which files the chosen modalities are read from."""
        return {}

    def remarks(self) -> list[str]:
        """Lines that a reader of the counts should know."""
        return []

    def listing(self, root: Path | None) -> Listing:
        """The samples under `root`, the folder of the raw files or of their converted form.

        Raises:
            ValueError: no root, an option out of its range, no sample, or one that is there twice.
            FileNotFoundError: root is not a folder.
            ModuleNotFoundError: the extra `video` is not installed.
        """
        self._check()
        if root is None:
            raise ValueError(
                f"root must be the folder of {self.name}'s files, but is not given: pass --root"
            )
        if not root.is_dir():
            raise FileNotFoundError(f"root must be {self.name}'s folder, but {root} is none")
        converted = shards.clips(
            root,
            self.name,
            self.modalities,
            Sampling(self.stride, self.frames),
            self._transform().read_size,
            self.source(),
            self.rule(),
        )
        listing = self.find(root) if converted is None else self.of_converted(root, converted)
        if not listing.clips:
            raise ValueError(
                f"{root} holds no {' or '.join(self.modalities)} of {self.name}: pass --root, the "
                "folder that the archives were unpacked in"
            )
        return listing._replace(classes=listing.classes or self.classes)

    def of_converted(self, root: Path, converted: shards.Converted) -> Listing:
        """The samples of a converted folder."""
        return Listing(converted.clips, converted.notes)

    def parts(self, listing: Listing, seed: int) -> dict[str, list[Clip]]:
        """The clips of each of PARTS; `seed` is for what is drawn by chance."""
        parts: dict[str, list[Clip]] = {part: [] for part in PARTS}
        for clip in listing.clips:
            parts[self.part(clip.name)].append(clip)
        return parts

    def trained_on(self, parts: dict[str, list[Clip]]) -> dict[str, list[Clip]]:
        """The parts as a training takes them."""
        return parts

    def missing(self, clip: Clip) -> list[str]:
        """The chosen modalities that a clip lacks."""
        return [modality for modality in self.modalities if modality not in clip.sources]

    def load(self, root: Path | None, seed: int) -> Data:
        """Lists the files under `root`; they are read when samples are.

        Samples that lack a modality are left out and reported on stderr.

        Raises:
            ValueError: as in `listing`; a test sample lacks a modality, without allow_missing; a
                split is empty.
            FileNotFoundError: as in `listing`.
            ModuleNotFoundError: likewise.
        """
        listing = self.listing(root)
        for note in listing.notes:
            _report(f"{self.name}: {note}")
        parts = {
            part: self._complete(part, clips) for part, clips in self.parts(listing, seed).items()
        }
        found = {
            "train": len(parts["train"]) + len(parts["validation"]),
            "test": len(parts["test"]),
        }
        for part, count in self.published().items():
            if found[part] != count:
                _report(f"{self.name}: {found[part]:,} {part} samples, published are {count:,}")
        parts = self.trained_on(parts)
        for part, clips in parts.items():
            if not clips:
                hint = self.validation_hint if part == "validation" else ""
                raise ValueError(f"{self.name}: {root} holds no complete sample for {part}{hint}")
        train, validation, test = (
            self.split_of(parts[part], seed, training=part == "train") for part in PARTS
        )
        return Data(
            modalities=self.modalities,
            classes=listing.classes,
            train=train,
            validation=validation,
            test=test,
            extractors=None,
            feature_sizes=None,
            steps=self.frames,
            forms=None if listing.forms is None else dict(listing.forms),
        )

    def split_of(self, clips: Sequence[Clip], seed: int, training: bool) -> ClipSplit:
        """Clips, sampled and transformed as the options say."""
        sampling = Sampling(self.stride, self.frames)
        transform = self._transform()
        return ClipSplit(clips, self.modalities, sampling, transform, seed, training, self.rule())

    def _check(self) -> None:
        Sampling(self.stride, self.frames)
        self._transform()
        self._check_modalities()

    def _check_modalities(self) -> None:
        names = self.modalities
        if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= self.maximum.keys():
            raise ValueError(
                f"modalities must be two or more of {', '.join(self.maximum)}, each once, "
                f"but are {' '.join(names)!r}"
            )

    def _transform(self) -> Transform:
        maximum = self.maximum if self.color_range == "fixed" else {}
        return Transform(self.image_size, self.flip, self.jitter, maximum)

    def _complete(self, part: str, clips: Sequence[Clip]) -> list[Clip]:
        """The clips with all modalities, the others reported."""
        lacking = [clip for clip in clips if self.missing(clip)]
        if not lacking:
            return list(clips)
        names = first(f"{clip.name} (no {', '.join(self.missing(clip))})" for clip in lacking)
        text = f"{self.name}: {len(lacking):,} of {len(clips):,} {part} samples lack a modality"
        if part == "test" and not self.allow_missing:
            raise ValueError(
                f"{text}: {names}; complete the files (--check lists them all), or pass "
                "--allow-missing to test without these samples"
            )
        _report(f"{text} and are left out: {names}")
        return [clip for clip in clips if not self.missing(clip)]


@dataclass(frozen=True)
class SubjectOptions(VideoOptions):
    """The options of data sets whose samples have a subject's number."""

    validation_subject: int | None = 1
    """Subject whose clips are left out of training, to validate on; never of the test set. None
    trains on all subjects and validates on the same clips, which must choose nothing: --select
    last."""

    validation_hint: ClassVar[str] = ": choose another --validation-subject"

    def trained_on(self, parts: dict[str, list[Clip]]) -> dict[str, list[Clip]]:
        """The parts as a training takes them."""
        if self.validation_subject is None:
            return {**parts, "validation": parts["train"]}
        return parts


def first(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f", and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _report(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
