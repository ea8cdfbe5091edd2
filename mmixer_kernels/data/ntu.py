"""NTU RGB+D 60 and 120: actions filmed by a Kinect v2 in RGB, depth and IR.

A sample is named SsssCcccPpppRrrrAaaa: setup, camera, subject, replication and action. Its files
are found by that name, whatever the folders between them and the root:

    <ID>_rgb.avi                            1920x1080
    <ID>_ir.avi                             512x424
    <ID>/MDepth-00000001.png, ...           512x424, 16-bit millimetres, 0 outside the body
    <ID>/Depth-00000001.png, ...            the same, background included

Sources: Shahroudy et al., CVPR 2016 (60); Liu et al., TPAMI 2020 (120); the lists of training
subjects are those of mmaction2's gen_ntu_rgbd_raw.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from .clips import Clip, Source
from .decode import DepthFolderSource, VideoSource, require
from .images import KINECT
from .ntu_classes import CLASSES
from .video import Listing, SubjectOptions

TRAINING_SUBJECTS_60 = frozenset(
    (1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38)
)
TRAINING_SUBJECTS_120 = TRAINING_SUBJECTS_60 | frozenset(
    (
        *(45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81),
        *(82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98, 100, 103),
    )
)
TRAINING_CAMERAS = (2, 3)

NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
FILE = re.compile(rf"({NAME.pattern})_(rgb|ir)\.avi")


class Name(NamedTuple):
    """The numbers that a sample's name consists of."""

    setup: int
    camera: int
    subject: int
    replication: int
    action: int


@dataclass(frozen=True)
class NtuOptions(SubjectOptions):
    """The options that NTU RGB+D 60 and 120 share."""

    modalities: tuple[Literal["rgb", "depth", "ir"], ...] = ("rgb", "depth")
    """Two or three of them."""
    split: Literal["cross-subject", "cross-view", "cross-setup"] = "cross-subject"
    depth: Literal["masked", "full"] = "masked"
    """Depth of the bodies alone, or with the background."""

    classes: ClassVar[tuple[str, ...]]
    maximum: ClassVar[dict[str, int]] = {"rgb": 255, "depth": 5000, "ir": 255}
    training_subjects: ClassVar[frozenset[int]]
    setups: ClassVar[int]

    def find(self, root: Path) -> Listing:
        require("av", "torchvision")
        sources: dict[str, dict[str, Source]] = {}
        paths: dict[tuple[str, str], str] = {}
        for name, modality, path in _files(root, self.depth):
            setup, *_, action = parse(name)
            of_this = 1 <= setup <= self.setups and 1 <= action <= len(self.classes)
            if modality not in self.modalities or not of_this:
                continue
            if (name, modality) in paths:
                raise ValueError(
                    f"the {modality} of {name} is there twice: {paths[name, modality]} and {path}: "
                    "remove one"
                )
            paths[name, modality] = path
            sources.setdefault(name, {})[modality] = _source(modality, path)
        clips = [Clip(name, parse(name).action - 1, sources[name]) for name in sorted(sources)]
        return Listing(clips, [])

    def source(self) -> dict[str, str]:
        return {"depth": self.depth} if "depth" in self.modalities else {}

    def part(self, name: str) -> str:
        sample = parse(name)
        if not self._trains(sample):
            return "test"
        return "validation" if sample.subject == self.validation_subject else "train"

    def _trains(self, sample: Name) -> bool:
        return sample.subject in self.training_subjects

    def _check(self) -> None:
        super()._check()
        subjects = self.training_subjects
        allowed = self.split != "cross-subject" or self.validation_subject in (None, *subjects)
        if not allowed:
            raise ValueError(
                "validation_subject must be one of the training subjects "
                f"{', '.join(map(str, sorted(subjects)))} or None, but is {self.validation_subject}"
            )


@dataclass(frozen=True)
class Ntu60Options(NtuOptions):
    """The data set `ntu60`: NTU RGB+D 60."""

    split: Literal["cross-subject", "cross-view"] = "cross-subject"
    """Tested are other subjects (the paper's), or another camera."""

    name = "ntu60"
    classes = CLASSES[:60]
    training_subjects = TRAINING_SUBJECTS_60
    setups = 17

    def published(self) -> dict[str, int]:
        if self.split == "cross-subject":
            return {"train": 40_320, "test": 16_560}
        return {"train": 37_920, "test": 18_960}

    def _trains(self, sample: Name) -> bool:
        if self.split == "cross-view":
            return sample.camera in TRAINING_CAMERAS
        return super()._trains(sample)


@dataclass(frozen=True)
class Ntu120Options(NtuOptions):
    """The data set `ntu120`: NTU RGB+D 120."""

    split: Literal["cross-subject", "cross-setup"] = "cross-subject"
    """Tested are other subjects (the paper's), or the odd setups."""

    name = "ntu120"
    classes = CLASSES
    training_subjects = TRAINING_SUBJECTS_120
    setups = 32
    recipe: ClassVar[dict[str, object]] = {**SubjectOptions.recipe, "model.extractor": "resnet34"}

    def published(self) -> dict[str, int]:
        if self.split == "cross-subject":
            return {"train": 63_360, "test": 51_120}
        return {"train": 54_720, "test": 59_760}

    def _trains(self, sample: Name) -> bool:
        return sample.setup % 2 == 0 if self.split == "cross-setup" else super()._trains(sample)


def parse(name: str) -> Name:
    """The numbers in a sample's name; ValueError when it is none."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no sample's name: it must be as S001C002P003R002A013")
    return Name(*map(int, match.groups()))


def _source(modality: str, path: str) -> Source:
    if modality == "depth":
        return DepthFolderSource(path)
    return VideoSource(path, KINECT[modality])


def _files(root: Path, depth: str) -> Iterator[tuple[str, str, str]]:
    """Yields (sample's name, modality, path) of every video and of every depth folder of this
    kind."""
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        kind = None  # the depth folders in this one are of one kind: one look tells it for all
        with os.scandir(folder) as entries:
            for entry in entries:
                if match := FILE.fullmatch(entry.name):
                    yield match[1], match[7], entry.path
                elif not entry.is_dir():
                    continue
                elif NAME.fullmatch(entry.name):
                    kind = kind or _depth_kind(entry.path)
                    if kind == depth or (kind is None and _says(folder) == depth):
                        yield entry.name, "depth", entry.path
                else:
                    folders.append(entry.path)


def _depth_kind(folder: str) -> str | None:
    """The kind of a sample's folder: "masked" or "full" depth, "other", or None if it is empty."""
    kind = None
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := re.match(r"(M?)Depth-", entry.name):
                return "masked" if match[1] else "full"
            kind = "other"
    return kind


def _says(folder: str) -> str:
    """The kind of depth that a folder of empty folders was meant for."""
    return "masked" if "masked" in folder.lower() else "full"
