"""Pictures as the bytes of a file: JPEG and PNG of 8 bits, PNG of 16 bits, by Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG_SIGNATURE, JPEG_END = b"\xff\xd8", b"\xff\xd9"
Form = Literal["colour", "grey", "8-bit", "16-bit"]
"""The form of a modality's frames: pictures of looks in colour or grey, which JPEG keeps well, or
one value per pixel, as a distance, of 8 or 16 bits, which is kept exactly."""


class Pixels(NamedTuple):
    """A form's channels, dtype, mode in Pillow, and the end of its files' names in a shard."""

    channels: Literal[1, 3]
    dtype: torch.dtype
    mode: str
    extension: Literal["jpg", "png"]


FORMS: dict[Form, Pixels] = {
    "colour": Pixels(3, torch.uint8, "RGB", "jpg"),
    "grey": Pixels(1, torch.uint8, "L", "jpg"),
    "8-bit": Pixels(1, torch.uint8, "L", "png"),
    "16-bit": Pixels(1, torch.uint16, "I;16", "png"),
}
GREY = ("L", "LA", "1")
"""Pillow's modes of pictures of 8 bits or fewer in one channel, with transparency or without."""
KINECT: dict[str, Form] = {"rgb": "colour", "ir": "grey", "depth": "16-bit"}
"""The forms of a Kinect's modalities, as in NTU RGB+D and NW-UCLA."""


def is_exact(form: Form) -> bool:
    """True where a frame's pixels are values, which are neither mixed nor rounded."""
    return FORMS[form].extension == "png"


def encode(frame: Tensor, form: Form, quality: int) -> bytes:
    """The picture of a frame: JPEG of colour uint8 `[3, h, w]` and grey uint8 `[1, h, w]`, PNG of
    values uint8 or uint16 `[1, h, w]`.

    Args:
        quality: quality of a JPEG, 1 to 100.

    Raises:
        ValueError: a frame of another form.
    """
    from PIL import Image

    channels, dtype, _, extension = FORMS[form]
    if frame.ndim != 3 or len(frame) != channels or frame.dtype != dtype:
        raise ValueError(
            f"a frame in the form {form} must be {dtype} [{channels}, h, w], but is {frame.dtype} "
            f"{list(frame.shape)}"
        )
    pixels = frame.permute(1, 2, 0).numpy() if channels == 3 else frame[0].numpy()
    image, file = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if extension == "png":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode(content: bytes, form: Form, strict: bool = False) -> Tensor:
    """The frame of a picture: colour uint8 `[3, h, w]`, grey and values of 8 bits uint8
    `[1, h, w]`, values of 16 bits uint16 `[1, h, w]`.

    Colours become grey, and grey colours, as the form has them; 16 bits are never made of 8, nor 8
    of 16. Damage in a PNG is always found; a JPEG has no checksum, so that in it what still decodes
    is not.

    Args:
        strict: refuse colours for grey and grey for colours too.

    Raises:
        ValueError: a picture that is damaged, of no known kind or of another form; the message does
            not name the file.
    """
    image, mode = _opened(content), FORMS[form].mode
    if form == "16-bit" and image.mode != mode:
        raise ValueError(f"must have 16 bits in one channel, but is {_kind(image.mode)}")
    if form != "16-bit" and _has_16_bits(content):  # Pillow cuts colours of 16 bits to 8
        raise ValueError("must have 8 bits per channel, but has 16")
    if strict and (image.mode in GREY) != (mode in GREY):
        raise ValueError(f"must be {_kind(mode)}, but is {_kind(image.mode)}")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    frame = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1)
    return frame.permute(2, 0, 1)


def form_of(content: bytes) -> Form:
    """The form that a picture is stored in: "16-bit", "grey" of 8 bits, or "colour".

    Raises:
        ValueError: as in `decode`.
    """
    image = _opened(content)
    if image.mode == FORMS["16-bit"].mode:
        return "16-bit"
    if _has_16_bits(content):
        raise ValueError("must have 8 bits per channel, but has 16")
    return "grey" if image.mode in GREY else "colour"


def _opened(content: bytes) -> Image.Image:
    """A picture with its pixels."""
    from PIL import Image, UnidentifiedImageError

    _check_png(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("cannot be decoded: it is neither JPEG nor PNG") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    return image


def _has_16_bits(content: bytes) -> bool:
    """True for a PNG of 16 bits per channel: its 25th byte has their number."""
    return content.startswith(PNG_SIGNATURE) and content[24] == 16


def _kind(mode: str) -> str:
    names = {"L": "8-bit grey", "RGB": "colour", "RGBA": "colour", "P": "a palette's colours"}
    return names.get(mode, f"of mode {mode}")


def _check_png(content: bytes) -> None:
    """Raises ValueError where a chunk of a PNG is cut off or is not what its checksum says: Pillow
    does not look at the checksums of the pixels."""
    if not content.startswith(PNG_SIGNATURE):
        return
    place, kind = len(PNG_SIGNATURE), b""
    while kind != PNG_END:
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if end > len(content):
            raise ValueError("is cut off")
        kind = content[place + 4 : place + 8]
        checksum = int.from_bytes(content[end - 4 : end], "big")
        if zlib.crc32(content[place + 4 : end - 4]) != checksum:
            raise ValueError("is damaged: a checksum is wrong")
        place = end
