"""Frames of video files and of folders of pictures, each by its number.

Videos are decoded by PyAV, in order, and frames are counted: seeking in AVI gives wrong frames. A
clip is always decoded to its end, for a frame that is lost shifts all that follow it, and the count
at the end tells. What no decoder can tell is a flipped bit that leaves the stream valid: it changes
pixels, and no frame's number.
"""

from __future__ import annotations

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DamagedFile
from . import images

WITHOUT_COUNT = "matroska"
"""The container whose header has no number of frames, as FFmpeg names it; WebM is one."""


def require(*packages: str) -> None:
    """Looks for packages before they are used in workers.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"video is read by the package {package}, which is not installed: "
                "pip install 'mmixer_kernels[video]'"
            )


@dataclass(frozen=True, slots=True)
class VideoSource:
    """A video file.

    Args:
        path: the file's path.
        channels: 3 for RGB, 1 for grey.
    """

    path: str
    channels: Literal[1, 3] = 3

    def count(self) -> int:
        """The header's number of frames; the number of packets in a file that has none.

        Raises:
            DamagedFile: no video, or no frame.
        """
        with self._opened() as (container, stream):
            count = _header_count(container, stream)
            if count is None:
                count = _packets(container, stream)
        if count < 1:
            raise DamagedFile(self.path, "its header says that it has no frame")
        return count

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """The frames uint8 `[n, channels, h, w]`; as `clips.Source` has it."""
        pictures: list[np.ndarray] = []
        for number, frame in enumerate(self._frames()):
            wanted = indices.count(number)
            if wanted:
                height, width = _resized(frame.height, frame.width, size)
                picture = frame.reformat(
                    width, height, "rgb24" if self.channels == 3 else "gray", threads=1
                )
                pictures += [picture.to_ndarray().reshape(height, width, self.channels)] * wanted
        if len(pictures) < len(indices):
            raise IndexError(f"{self.path}: has no frame {indices[-1]}")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def verify(self, full: bool) -> None:
        """Compares the number of packets, or in full that of decoded frames, with the header's.

        Raises:
            DamagedFile: they differ, or the file cannot be read.
        """
        if full:
            for _ in self._frames():
                pass
            return
        with self._opened() as (container, stream):
            self._compare(_packets(container, stream), _header_count(container, stream))

    def _frames(self) -> Iterator[Any]:
        """Yields every decoded frame; DamagedFile at the end unless there were as many as the
        header says."""
        number = 0
        with self._opened() as (container, stream):
            # The loader's workers are the parallelism.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DamagedFile(self.path, f"frame {number} is damaged")
                yield frame
                number += 1
            self._compare(number, _header_count(container, stream))

    def _compare(self, found: int, expected: int | None) -> None:
        expected = max(1, found) if expected is None else expected
        if found != expected:
            raise DamagedFile(self.path, f"has {found} frames, but its header says {expected}")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        import av

        try:
            with av.open(self.path, metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise DamagedFile(self.path, "has no video")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise DamagedFile(self.path, "has a codec that is not known here")
                yield container, stream
        except av.FFmpegError as error:
            raise DamagedFile(self.path, f"cannot be decoded: {error.strerror}") from error


class PictureSource(ABC):
    """A source of picture files, one per frame.

    PNG has checksums; JPEG has none, so that flipped bits in it show only where decoding fails.
    """

    folder: str
    depth: bool

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The files' names in the order of time."""

    def count(self) -> int:
        """The number of files.

        Raises:
            DamagedFile: there is none.
        """
        count = len(self.names())
        if count < 1:
            raise DamagedFile(self.folder, "has no frame")
        return count

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """The frames uint8 `[n, 3, h, w]`, or uint16 `[n, 1, h, w]` of depth; as `clips.Source`."""
        names = self.names()
        pictures: list[Tensor] = []
        for index in indices:
            path = os.path.join(self.folder, names[index])
            picture = _shrunk(_decoded(path, self.depth), size)
            if pictures and picture.shape != pictures[0].shape:
                raise DamagedFile(path, f"has a size other than that of {names[indices[0]]}")
            pictures.append(picture)
        return torch.stack(pictures)

    def verify(self, full: bool) -> None:
        """Looks for each file's beginning and end, or in full decodes it.

        Raises:
            DamagedFile: a file that is cut off or cannot be decoded.
        """
        self.count()
        for name in self.names():
            path = os.path.join(self.folder, name)
            if full:
                _decoded(path, self.depth)
            else:
                _check_ends(path)


@dataclass(frozen=True, slots=True)
class DepthFolderSource(PictureSource):
    """A folder of 16-bit PNGs that are numbered from 1, as `MDepth-00000001.png`."""

    folder: str
    depth = True

    def names(self) -> list[str]:
        """The files' names in the order of their numbers; DamagedFile where a number is missing."""
        try:
            listed = os.listdir(self.folder)
        except OSError as error:
            raise DamagedFile(self.folder, f"cannot be listed: {error.strerror}") from error
        matches = (re.fullmatch(r"M?Depth-(\d+)\.png", name) for name in listed)
        numbered = sorted((int(match[1]), match[0]) for match in matches if match)
        for expected, (number, name) in enumerate(numbered, 1):
            if number != expected:
                raise DamagedFile(self.folder, f"has no frame {expected}, but {name}")
        return [name for _, name in numbered]


@dataclass(frozen=True, slots=True)
class PictureFilesSource(PictureSource):
    """Files of a folder that are known by name.

    Args:
        folder: where they are.
        files: their names in the order of time.
        depth: whether they are 16-bit depth; colour pictures otherwise.
    """

    folder: str
    files: tuple[str, ...]
    depth: bool

    def names(self) -> tuple[str, ...]:
        return self.files


def _header_count(container: Any, stream: Any) -> int | None:
    """The header's number of frames; None for a container whose header has none."""
    return None if container.format.name.startswith(WITHOUT_COUNT) else stream.frames


def _packets(container: Any, stream: Any) -> int:
    return sum(packet.size > 0 for packet in container.demux(stream))


def _decoded(path: str, depth: bool) -> Tensor:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DamagedFile(path, f"cannot be read: {error.strerror}") from error
    try:
        return images.decode(content, "depth" if depth else "rgb")
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error


def _shrunk(image: Tensor, size: int) -> Tensor:
    """The image `[C, h, w]` with a shorter side of `size`: depth by nearest neighbour, colours
    smoothed."""
    old_height, old_width = image.shape[-2:]
    height, width = _resized(old_height, old_width, size)
    if image.dtype == torch.uint16:
        rows = (2 * torch.arange(height) + 1) * old_height // (2 * height)
        columns = (2 * torch.arange(width) + 1) * old_width // (2 * width)
        return image[:, rows[:, None], columns]
    from torchvision.transforms.v2 import functional

    return functional.resize(image, [height, width], antialias=True)


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with a shorter side of `size`, in the same ratio."""
    shorter = min(height, width)
    return round(height * size / shorter), round(width * size / shorter)


def _check_ends(path: str) -> None:
    """Raises DamagedFile unless a PNG or JPEG begins and ends as it must."""
    png = path.endswith(".png")
    signature = images.PNG_SIGNATURE if png else images.JPEG_SIGNATURE
    end = images.PNG_END if png else images.JPEG_END
    try:
        with open(path, "rb") as file:
            begins = file.read(len(signature)) == signature
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
            ends = end in file.read()
    except OSError as error:
        raise DamagedFile(path, f"cannot be read: {error.strerror}") from error
    if not (begins and ends):
        kind = "PNG" if png else "JPEG"
        raise DamagedFile(path, "is cut off" if begins else f"is no {kind} file")
