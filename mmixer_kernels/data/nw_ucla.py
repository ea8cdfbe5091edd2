"""Northwestern-UCLA Multiview Action 3D: ten actions from three views, RGB and depth (Kinect).

A sample is a folder `view_<v>/a<aa>_s<ss>_e<ee>`: action, subject, execution. Its pictures are
`frame_<n>_tc_<time>_rgb.jpg` (640x480) and `frame_<n>_tc_<time>_depth.png` (320x240, 16-bit
millimetres). <n> has no leading zeros, so names sorted as text are not in the order of time, and
the two pictures of a frame have times of their own: frames are sorted and paired by the number.

Source: Wang et al., CVPR 2014. Views 1 and 2 train, view 3 tests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from .clips import Clip, Source
from .decode import PictureFilesSource, require
from .images import KINECT
from .video import Listing, SubjectOptions, first

ACTIONS = {
    1: "pick up with one hand",
    2: "pick up with two hands",
    3: "drop trash",
    4: "walk around",
    5: "sit down",
    6: "stand up",
    8: "donning",
    9: "doffing",
    11: "throw",
    12: "carry",
}
"""The actions by the number in a folder's name; labels are their places here."""
SUBJECTS = 10
TEST_VIEW = 3

VIEW = re.compile(r"view_(\d)")
FOLDER = re.compile(r"a(\d\d)_s(\d\d)_e(\d\d)")
FRAME = re.compile(r"frame_(\d+)_tc_\d+_(?:(rgb)\.jpg|(depth)\.png)")


@dataclass(frozen=True)
class NwUclaOptions(SubjectOptions):
    """The data set `nw-ucla`: Northwestern-UCLA Multiview Action 3D."""

    modalities: tuple[Literal["rgb", "depth"], ...] = ("rgb", "depth")
    """Both modalities, in the order of the network's streams."""

    name = "nw-ucla"
    classes = tuple(ACTIONS.values())
    maximum: ClassVar[dict[str, int]] = {"rgb": 255, "depth": 3975}

    def find(self, root: Path) -> Listing:
        require("torchvision")
        clips: dict[str, Clip] = {}
        empty, unknown, unpaired = [], [], []
        for view, folder in _folders(root):
            match = FOLDER.fullmatch(os.path.basename(folder))
            assert match is not None
            name = f"{match[0]}_v{view:02d}"
            if name in clips:
                raise ValueError(f"{name} is there twice, one is {folder}: remove one")
            action = int(match[1])
            if action not in ACTIONS:
                unknown.append(folder)
                continue
            files = frame_files(folder)
            found = {m: files[m] for m in self.modalities if files[m]}
            if not found:
                empty.append(folder)
                continue
            common = sorted(set.intersection(*(set(numbered) for numbered in found.values())))
            if any(len(numbered) > len(common) for numbered in found.values()):
                unpaired.append(
                    f"{folder} ({', '.join(f'{len(f)} {m}' for m, f in found.items())})"
                )
            sources: dict[str, Source] = {
                modality: PictureFilesSource(
                    folder, tuple(numbered[n] for n in common), KINECT[modality]
                )
                for modality, numbered in found.items()
            }
            clips[name] = Clip(name, list(ACTIONS).index(action), sources)
        notes = {
            "skipped folders without a frame": empty,
            "skipped folders of no known action": unknown,
            "samples with frames of one modality alone, which are left out": unpaired,
        }
        return Listing(
            [clips[name] for name in sorted(clips)],
            [
                f"{len(names)} {text}: {first(sorted(names))}"
                for text, names in notes.items()
                if names
            ],
        )

    def part(self, name: str) -> str:
        folder, _, view = name.rpartition("_v")
        if int(view) == TEST_VIEW:
            return "test"
        match = FOLDER.fullmatch(folder)
        assert match is not None
        return "validation" if int(match[2]) == self.validation_subject else "train"

    def remarks(self) -> list[str]:
        return [
            "published: lists of 1,020 training and 464 test samples, 1,484 in all; 1,475 in the "
            "paper; so the counts are not compared"
        ]

    def _check(self) -> None:
        super()._check()
        if self.validation_subject not in (None, *range(1, SUBJECTS + 1)):
            raise ValueError(
                f"validation_subject must be in 1..{SUBJECTS} or None, "
                f"but is {self.validation_subject}"
            )


def _folders(root: Path) -> Iterator[tuple[int, str]]:
    """Yields (view, folder) of every sample."""
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        view = VIEW.fullmatch(os.path.basename(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    continue
                if view and FOLDER.fullmatch(entry.name):
                    yield int(view[1]), entry.path
                else:
                    folders.append(entry.path)


def frame_files(folder: str) -> dict[str, dict[int, str]]:
    """The files' names by modality and number."""
    files: dict[str, dict[int, str]] = {"rgb": {}, "depth": {}}
    for name in sorted(os.listdir(folder)):
        if match := FRAME.fullmatch(name):
            numbered = files[match[2] or match[3]]
            number = int(match[1])
            if number in numbered:
                raise ValueError(
                    f"{folder} has two pictures of one frame, {numbered[number]} and {name}: "
                    "remove one"
                )
            numbered[number] = name
    return files
