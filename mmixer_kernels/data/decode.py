"""Frames of video files and of folders of pictures, each by its number.

Videos are decoded by PyAV, in order, and frames are counted: seeking in AVI gives wrong frames. A
clip is always decoded to its end, for a frame that is lost shifts all that follow it, and the count
at the end tells. What no decoder can tell is a flipped bit that leaves the stream valid: it changes
pixels, and no frame's number.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DamagedFile
from . import images
from .images import Form

T = TypeVar("T")

VIDEO_ENDINGS = (
    *(".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v"),
    *(".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp"),
)
"""Endings of videos' names, in small letters."""
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
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
        form: the form of its frames. Colours become grey, and grey colours, as it has them.
        strict: refuse colours for grey and grey for colours.
        given_rate: frames per second, where the header's are not to be taken.
    """

    path: str
    form: Form = "colour"
    strict: bool = False
    given_rate: float | None = None

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

    def rate(self) -> float:
        """Frames per second: those given, or the header's.

        Raises:
            DamagedFile: the header has none, or cannot be read.
        """
        if self.given_rate is not None:
            return self.given_rate
        with self._opened() as (_, stream):
            if not stream.average_rate:
                raise DamagedFile(self.path, "its header has no frame rate: give it by --rates")
            return float(stream.average_rate)

    def stored_form(self) -> Form:
        """The form that the header tells: "16-bit", "grey" or "colour".

        Raises:
            DamagedFile: no video.
        """
        with self._opened() as (_, stream):
            return _form_of_pixels(stream.codec_context.pix_fmt or "")

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """The frames `[n, channels, h, w]` in the source's form; as `clips.Source` has it."""
        pictures: list[np.ndarray] = []
        for number, frame in enumerate(self._frames()):
            wanted = indices.count(number)
            if wanted:
                self._check_form(frame.format.name)
                pictures += [self._picture(frame, size)] * wanted
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

    def _picture(self, frame: Any, size: int) -> np.ndarray:
        """A decoded frame as `[h, w, channels]`, upright."""
        pixel_format = {"colour": "rgb24", "16-bit": "gray16le"}.get(self.form, "gray")
        height, width = frame.height, frame.width
        exact = images.is_exact(self.form)
        if not exact:
            height, width = _resized(height, width, size)
        picture = frame.reformat(width, height, pixel_format, threads=1).to_ndarray()
        picture = picture.reshape(height, width, -1)
        if exact:
            rows, columns = _nearest(height, width, size)
            picture = picture[rows[:, None], columns]
        # Phones write the sensor's rows and how far to turn them, counterclockwise in degrees.
        return np.rot90(picture, round(getattr(frame, "rotation", 0) / 90))

    def _check_form(self, pixel_format: str) -> None:
        found = _form_of_pixels(pixel_format)
        if (found == "16-bit") != (self.form == "16-bit"):
            bits = "16 bits in one channel" if self.form == "16-bit" else "8 bits per channel"
            raise DamagedFile(self.path, f"must have {bits}, but its pixels are {pixel_format}")
        if self.strict and (found == "colour") != (self.form == "colour"):
            raise DamagedFile(
                self.path, f"must be {self.form}, but is {found}: its pixels are {pixel_format}"
            )

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
    form: Form
    strict: bool
    given_rate: float | None

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
            raise DamagedFile(self.folder, "has no frame: it must hold pictures, JPEG or PNG")
        return count

    def rate(self) -> float | None:
        """Frames per second, None where they are not given: pictures do not tell."""
        return self.given_rate

    def stored_form(self) -> Form:
        """The form that the first file is stored in.

        Raises:
            DamagedFile: there is none, or it cannot be decoded.
        """
        self.count()
        path = os.path.join(self.folder, self.names()[0])
        return _read(path, images.form_of)

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """The frames `[n, channels, h, w]` in the source's form; as `clips.Source`."""
        names = self.names()
        pictures: list[Tensor] = []
        for index in indices:
            path = os.path.join(self.folder, names[index])
            picture = _shrunk(self._decoded(path), size, images.is_exact(self.form))
            if pictures and picture.shape != pictures[0].shape:
                raise DamagedFile(path, f"has a size other than that of {names[indices[0]]}")
            pictures.append(picture)
        return torch.stack(pictures)

    def verify(self, full: bool) -> None:
        """Looks for each file's beginning and end and decodes the first one, or in full all.

        Raises:
            DamagedFile: a file that is cut off, cannot be decoded or has another form.
        """
        self.count()
        for place, name in enumerate(self.names()):
            path = os.path.join(self.folder, name)
            if full or place == 0:
                self._decoded(path)
            else:
                _check_ends(path)

    def _decoded(self, path: str) -> Tensor:
        return _read(path, lambda content: images.decode(content, self.form, self.strict))


@dataclass(frozen=True, slots=True)
class DepthFolderSource(PictureSource):
    """A folder of 16-bit PNGs that are numbered from 1, as `MDepth-00000001.png`."""

    folder: str
    form = "16-bit"
    strict = True
    given_rate = None

    def names(self) -> list[str]:
        """The files' names in the order of their numbers; DamagedFile where a number is missing."""
        listed = _listed(self.folder)
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
        form: the form of the frames; colours become grey, and grey colours, as it has them.
    """

    folder: str
    files: tuple[str, ...]
    form: Form
    strict = False
    given_rate = None

    def names(self) -> tuple[str, ...]:
        return self.files


@dataclass(frozen=True, slots=True)
class NumberedPicturesSource(PictureSource):
    """The pictures of a folder in the order of the numbers in their names.

    Names are compared by their numbers, the first one first, as 2 and 10 of `left_2_t10.png`; a
    name that is a decimal number, as a time stamp is, counts as that number. Files that are no
    pictures and hidden files are passed over.

    Args:
        folder: where they are.
        form: the form of the frames; colours become grey, and grey colours, as it has them.
        strict: refuse colours for grey and grey for colours.
        given_rate: frames per second, where they are known.
    """

    folder: str
    form: Form
    strict: bool = False
    given_rate: float | None = None

    def names(self) -> list[str]:
        """The files' names in order; DamagedFile where two have one number, or one has none."""
        return list(self._numbered().values())

    def has_gap(self) -> bool:
        """True where the first of the numbers that changes rises by unequal steps, as where a
        picture is missing; time stamps are not looked at."""
        for column in zip(*self._numbered(), strict=False):
            steps = {after - before for before, after in itertools.pairwise(column)}
            if steps - {0}:
                return len(steps) > 1 and 0 not in steps and all(s == int(s) for s in steps)
        return False

    def _numbered(self) -> dict[tuple[Decimal, ...], str]:
        """The files' names by their numbers, in order."""
        numbered: dict[tuple[Decimal, ...], str] = {}
        for name in sorted(filter(is_picture, _listed(self.folder))):
            stem = os.path.splitext(name)[0]
            numbers = [stem] if re.fullmatch(r"\d+\.\d+", stem) else re.findall(r"\d+", stem)
            key = tuple(map(Decimal, numbers))
            if not key:
                raise DamagedFile(
                    os.path.join(self.folder, name),
                    "has no number in its name, which tells its place in time: take it away",
                )
            if key in numbered:
                raise DamagedFile(
                    self.folder, f"has two pictures of one number, {numbered[key]} and {name}"
                )
            numbered[key] = name
        return dict(sorted(numbered.items()))


def is_picture(name: str) -> bool:
    """True for the name of a picture that is not hidden."""
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")


def _header_count(container: Any, stream: Any) -> int | None:
    """The header's number of frames; None for a container whose header has none."""
    return None if container.format.name.startswith(WITHOUT_COUNT) else stream.frames


def _packets(container: Any, stream: Any) -> int:
    return sum(packet.size > 0 for packet in container.demux(stream))


def _form_of_pixels(pixel_format: str) -> Form:
    """The form of a video's frames, by FFmpeg's name of their pixels."""
    if not pixel_format.startswith(("gray", "mono")):
        return "colour"
    return "16-bit" if re.match(r"gray(9|1\d)", pixel_format) else "grey"


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DamagedFile(folder, f"cannot be listed: {error.strerror}") from error


def _read(path: str, decode: Callable[[bytes], T]) -> T:
    """Decodes a file's content."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DamagedFile(path, f"cannot be read: {error.strerror}") from error
    try:
        return decode(content)
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error


def _shrunk(image: Tensor, size: int, exact: bool) -> Tensor:
    """The image `[C, h, w]` with a shorter side of `size`: exact values by nearest neighbour, looks
    smoothed."""
    if exact:
        rows, columns = _nearest(image.shape[-2], image.shape[-1], size)
        return image[:, torch.from_numpy(rows)[:, None], torch.from_numpy(columns)]
    from torchvision.transforms.v2 import functional

    height, width = _resized(image.shape[-2], image.shape[-1], size)
    return functional.resize(image, [height, width], antialias=True)


def _nearest(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns that a shorter side of `size` takes, each the nearest to its middle."""
    new_height, new_width = _resized(height, width, size)
    rows = (2 * np.arange(new_height) + 1) * height // (2 * new_height)
    columns = (2 * np.arange(new_width) + 1) * width // (2 * new_width)
    return rows, columns


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with a shorter side of `size`, in the same ratio."""
    shorter = min(height, width)
    return round(height * size / shorter), round(width * size / shorter)


def _check_ends(path: str) -> None:
    """Raises DamagedFile unless a PNG or JPEG begins and ends as it must."""
    png = path.lower().endswith(".png")
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
