"""Loose clips, given file by file, for a network that knows their data set.

A sample's files share its name: `NAME_rgb.avi`, `NAME_ir.avi` (or another kind of video file), and
the depth folder `NAME` or `NAME_depth` of 16-bit PNGs, `MDepth-00000001.png` or
`Depth-00000001.png`. A folder of NW-UCLA's `frame_<n>_tc_<time>_rgb.jpg` and `_depth.png` is a
sample by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from . import nw_ucla
from .base import UNKNOWN
from .clips import Clip, Source
from .decode import DepthFolderSource, PictureFilesSource, VideoSource, require
from .images import KINECT
from .ntu import NAME
from .video import VideoOptions


def clips_of(files: Sequence[Path], options: VideoOptions) -> list[Clip]:
    """The samples that the files make up, in the order of their first files.

    A sample named as in NTU RGB+D or NW-UCLA has that name's label, where its class is one of the
    data set's; others have UNKNOWN.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file of no known kind, one too many or one too few.
        DamagedFile: a folder that cannot be read.
        ModuleNotFoundError: the extra `video` is not installed.
    """
    require("av", "torchvision")
    samples: dict[str, dict[str, Source]] = {}
    for file in files:
        name, sources = _sources(file)
        sample = samples.setdefault(name, {})
        for modality, source in sources.items():
            if modality not in options.modalities:
                raise ValueError(
                    f"{file} is {modality}, but the network knows {', '.join(options.modalities)}: "
                    "leave it out"
                )
            if modality in sample:
                raise ValueError(f"{file} is the second {modality} of the sample {name}: give one")
            sample[modality] = source
    for name, sample in samples.items():
        missing = [modality for modality in options.modalities if modality not in sample]
        if missing:
            raise ValueError(
                f"the sample {name} lacks {' and '.join(missing)}: give {_kinds(name, missing)}, "
                "for files belong together by their names"
            )
    return [Clip(name, _label(name, options), sample) for name, sample in samples.items()]


def _sources(file: Path) -> tuple[str, dict[str, Source]]:
    """A file's sample, and its sources by modality."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    if not file.is_dir():
        match = re.fullmatch(r"(.+)_(rgb|ir)", file.stem)
        if match is None:
            raise ValueError(
                f"{file} must end in _rgb or _ir before the dot, as S001C001P001R001A001_rgb.avi "
                "does, or be a folder of depth or of NW-UCLA"
            )
        return match[1], {match[2]: VideoSource(str(file), KINECT[match[2]])}
    names = os.listdir(file)
    if any(nw_ucla.FRAME.fullmatch(name) for name in names):
        return _nw_ucla_name(file.resolve()), _nw_ucla(file)
    if any(re.fullmatch(r"M?Depth-\d+\.png", name) for name in names):
        return file.resolve().name.removesuffix("_depth"), {"depth": DepthFolderSource(str(file))}
    raise ValueError(
        f"{file} must hold MDepth-00000001.png, ..., Depth-00000001.png, ... or NW-UCLA's "
        "frame_<n>_tc_<time>_rgb.jpg and _depth.png"
    )


def _nw_ucla_name(folder: Path) -> str:
    """The sample's name in its data set, where the folder lies as it does there."""
    view = nw_ucla.VIEW.fullmatch(folder.parent.name)
    return f"{folder.name}_v{int(view[1]):02d}" if view else folder.name


def _nw_ucla(folder: Path) -> dict[str, Source]:
    files = nw_ucla.frame_files(str(folder))
    common = sorted(set.intersection(*(set(numbered) for numbered in files.values())))
    return {
        modality: PictureFilesSource(
            str(folder), tuple(numbered[n] for n in common), KINECT[modality]
        )
        for modality, numbered in files.items()
    }


def _label(name: str, options: VideoOptions) -> int:
    if isinstance(options, nw_ucla.NwUclaOptions):
        folder = nw_ucla.FOLDER.match(name)
        action = int(folder[1]) if folder else UNKNOWN
        return list(nw_ucla.ACTIONS).index(action) if action in nw_ucla.ACTIONS else UNKNOWN
    match = NAME.fullmatch(name)
    action = int(match[5]) if match else 0
    return action - 1 if 1 <= action <= len(options.classes) else UNKNOWN


def _kinds(name: str, modalities: Sequence[str]) -> str:
    files = {"rgb": f"{name}_rgb.avi", "ir": f"{name}_ir.avi", "depth": f"the folder {name}"}
    return " and ".join(files[modality] for modality in modalities)
