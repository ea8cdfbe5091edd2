"""Pictures as the bytes of a file: JPEG and PNG of 8 bits, PNG of 16-bit depth, by Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG_SIGNATURE, JPEG_END = b"\xff\xd8", b"\xff\xd9"
MODES = {"rgb": "RGB", "ir": "L", "depth": "I;16"}
"""Pillow's name of each modality's pixels."""


def encode(frame: Tensor, modality: str, quality: int) -> bytes:
    """The picture of a frame `[C, h, w]`: JPEG of rgb and ir (uint8), PNG of depth (uint16).

    Args:
        quality: of a JPEG, 1 to 100.
    """
    from PIL import Image

    pixels = frame.permute(1, 2, 0).numpy() if modality == "rgb" else frame[0].numpy()
    image, file = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if modality == "depth":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode(content: bytes, modality: str) -> Tensor:
    """The frame of a picture: rgb uint8 `[3, h, w]`, ir uint8 and depth uint16 `[1, h, w]`.

    Colours are converted to what the modality has; depth must have its 16 bits.

    Raises:
        ValueError: a picture that is damaged, or depth where colours are asked for or the other
            way round; the message says what it is without naming a file.
    """
    from PIL import Image

    _check_png(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        image.load()
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    is_depth = image.mode == MODES["depth"]
    if modality == "depth" and not is_depth:
        raise ValueError(f"must be 16-bit depth in one channel, but is {_kind(image.mode)}")
    if modality != "depth" and is_depth:
        raise ValueError("must have 8 bits per channel, but is 16-bit depth")
    pixels = np.array(image if is_depth else image.convert(MODES[modality]))
    frame = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1)
    return frame.permute(2, 0, 1)


def _kind(mode: str) -> str:
    names = {"L": "8-bit grey", "RGB": "colour", "RGBA": "colour", "P": "a palette's colours"}
    return names.get(mode, f"of mode {mode}")


def _check_png(content: bytes) -> None:
    """ValueError where a chunk of a PNG is cut off or is not what its checksum says: Pillow does
    not look at the checksums of the pixels."""
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
