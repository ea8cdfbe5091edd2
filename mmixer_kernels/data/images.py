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
KINDS = {
    "rgb": (3, torch.uint8, "RGB"),
    "ir": (1, torch.uint8, "L"),
    "depth": (1, torch.uint16, "I;16"),
}
"""Channels, dtype and Pillow's mode of each modality's frames."""


def encode(frame: Tensor, modality: str, quality: int) -> bytes:
    """The picture of a frame: JPEG of rgb uint8 `[3, h, w]` and ir uint8 `[1, h, w]`, PNG of depth
    uint16 `[1, h, w]`.

    Args:
        quality: quality of a JPEG, 1 to 100.

    Raises:
        ValueError: a frame of another kind than the modality's.
    """
    from PIL import Image

    channels, dtype, _ = KINDS[modality]
    if frame.ndim != 3 or len(frame) != channels or frame.dtype != dtype:
        raise ValueError(
            f"a frame of {modality} must be {dtype} [{channels}, h, w], but is {frame.dtype} "
            f"{list(frame.shape)}"
        )
    pixels = frame.permute(1, 2, 0).numpy() if channels == 3 else frame[0].numpy()
    image, file = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if modality == "depth":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode(content: bytes, modality: str) -> Tensor:
    """The frame of a picture: rgb uint8 `[3, h, w]`, ir uint8 and depth uint16 `[1, h, w]`.

    Colours are converted to what the modality has; depth must have its 16 bits. Damage in a PNG is
    always found; a JPEG has no checksum, so that in it what still decodes is not.

    Raises:
        ValueError: a picture that is damaged or of no known kind, depth where colours are asked
            for, or the other way round; the message does not name the file.
    """
    from PIL import Image, UnidentifiedImageError

    _check_png(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("cannot be decoded: it is neither JPEG nor PNG") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    mode = KINDS[modality][2]
    if modality == "depth" and image.mode != mode:
        raise ValueError(f"must be 16-bit depth in one channel, but is {_kind(image.mode)}")
    # Pillow cuts colours of 16 bits to 8; the 25th byte of a PNG has their number.
    if modality != "depth" and content.startswith(PNG_SIGNATURE) and content[24] == 16:
        raise ValueError("must have 8 bits per channel, but has 16")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    frame = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1)
    return frame.permute(2, 0, 1)


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
