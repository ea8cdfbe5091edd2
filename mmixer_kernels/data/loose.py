"""Loose clips, given file by file, for a network that knows their data set.

Of a network of `clips`, a path is one of three:

- `.../MODALITY/NAME`, a folder of numbered pictures or a video, where MODALITY is the last folder
  in the path that has the name of one of the network's modalities, and NAME what follows it;
- a folder with a folder for each modality: every sample in it;
- a list, `.../new.txt`, of a name per line, of samples beside it. A label may follow, as in
  `lists`; without one, and in the other two, samples have none. A line that as a whole names a
  sample there is its name, even with blanks.

The frames must have the forms that they had in the training.

Of a network of NTU RGB+D or NW-UCLA, a sample's files share its name: `NAME_rgb.avi`,
`NAME_ir.avi` (or another kind of video file), and the depth folder `NAME` or `NAME_depth` of 16-bit
PNGs, `MDepth-00000001.png` or `Depth-00000001.png`. A folder of NW-UCLA's
`frame_<n>_tc_<time>_rgb.jpg` and `_depth.png` is a sample by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from . import nw_ucla
from .base import UNKNOWN, Data
from .clips import Clip, Source
from .decode import VIDEO_ENDINGS, DepthFolderSource, PictureFilesSource, VideoSource, require
from .images import KINECT, Form
from .lists import read_new
from .ntu import NAME
from .recordings import ClipsOptions, Paths, files_of
from .video import VideoOptions

T = TypeVar("T")


def clips_of(files: Sequence[Path], options: VideoOptions, data: Data) -> list[Clip]:
    """The samples that the files make up, in the order of their first files.

    Of `clips`, a list's samples have the labels that it gives. Otherwise a sample named as in NTU
    RGB+D or NW-UCLA has that name's label, where its class is one of the data set's; others have
    UNKNOWN.

    Args:
        data: the data set that the network knows; its samples are not needed.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file of no known kind, one too many or one too few.
        DamagedFile: a folder that cannot be read.
        ModuleNotFoundError: the extra `video` is not installed.
    """
    require("av", "torchvision")
    if isinstance(options, ClipsOptions):
        return _recordings(files, options, data)
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
            _add(sample, name, modality, file, source)
    _check_complete(samples, options.modalities, _kinds)
    return [Clip(name, _label(name, options), sample) for name, sample in samples.items()]


def _recordings(files: Sequence[Path], options: ClipsOptions, data: Data) -> list[Clip]:
    """The samples of `clips` that the files make up."""
    paths: Paths = {}
    labels: dict[str, int] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist")
        found = _paths_of(file, options, data, labels)
        for name, of_modalities in found.items():
            sample = paths.setdefault(name, {})
            for modality, path in of_modalities.items():
                _add(sample, name, modality, path, path)
    _check_complete(paths, options.modalities, lambda name, missing: f".../{missing[0]}/{name} too")
    assert data.forms is not None
    sources = options.sources(paths, cast(dict[str, Form], data.forms))
    return [Clip(name, labels.get(name, UNKNOWN), sources[name]) for name in paths]


def _add(sample: dict[str, T], name: str, modality: str, path: str | Path, value: T) -> None:
    """Adds a modality to a sample, which must not have it yet."""
    if modality in sample:
        raise ValueError(f"{path} is the second {modality} of the sample {name}: give one")
    sample[modality] = value


def _check_complete(
    samples: Mapping[str, Collection[str]],
    modalities: Sequence[str],
    wanted: Callable[[str, Sequence[str]], str],
) -> None:
    """Raises ValueError where a sample lacks a modality.

    Args:
        wanted: says what to give of a sample that lacks these modalities.
    """
    for name, sample in samples.items():
        missing = [modality for modality in modalities if modality not in sample]
        if missing:
            raise ValueError(
                f"the sample {name} lacks {' and '.join(missing)}: give {wanted(name, missing)}, "
                "for files belong together by their names"
            )


def _paths_of(file: Path, options: ClipsOptions, data: Data, labels: dict[str, int]) -> Paths:
    """The samples' paths that one path stands for; a list's labels are added to `labels`."""
    modalities = options.modalities
    if file.suffix == ".txt":
        entries = read_new(file, data.classes, files_of(file.parent, modalities))
        places = {entry.name: entry.listed.place for entry in entries}
        labels.update({entry.name: entry.label for entry in entries})
        found = files_of(file.parent, modalities, places)
        return {name: found.get(name, {}) for name in places}
    if any((file / modality).is_dir() for modality in modalities):
        found = files_of(file, modalities)
        return {name: found[name] for name in sorted(found)}
    *folders, last = Path(os.path.abspath(file)).parts
    place = max((i for i, folder in enumerate(folders) if folder in modalities), default=None)
    if place is None:
        raise ValueError(
            f"{file} must lie in a folder named as its modality, {' or '.join(modalities)}, or be "
            "a folder that has one for each, or a list of names ending in .txt"
        )
    stem, ending = os.path.splitext(last)
    name = "/".join([*folders[place + 1 :], stem if ending.lower() in VIDEO_ENDINGS else last])
    return {name: {folders[place]: str(file)}}


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
