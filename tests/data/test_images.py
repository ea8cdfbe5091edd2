"""Pictures as bytes: what comes back, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

Image = pytest.importorskip("PIL.Image")

from mmixer_kernels.data import images  # noqa: E402


def ramp(channels: int) -> Tensor:
    """Smooth, as JPEG keeps well, and of other values in each channel, row and column."""
    rows, columns = torch.arange(33)[:, None], torch.arange(41)
    return torch.stack([40 * c + 2 * rows + columns for c in range(1, channels + 1)]).byte()


def file_of(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.fixture
def depth() -> Tensor:
    """A picture of depth that has all of its 16 bits."""
    return torch.randint(65536, (1, 33, 41)).to(torch.uint16)


@pytest.mark.parametrize(("form", "channels"), [("colour", 3), ("grey", 1)])
def test_jpeg_keeps_channels_rows_and_columns(form: images.Form, channels: int) -> None:
    frame = ramp(channels)
    content = images.encode(frame, form, 95)
    found = images.decode(content, form)
    assert content.startswith(images.JPEG_SIGNATURE)
    assert (found.dtype, found.shape) == (torch.uint8, frame.shape)
    assert (found.int() - frame.int()).abs().max() <= 3
    assert len(images.encode(frame, form, 10)) < len(content)
    assert images.encode(frame, form, 95) == content


def test_depth_is_exact(depth: Tensor) -> None:
    content = images.encode(depth, "16-bit", 95)
    found = images.decode(content, "16-bit")
    assert content.startswith(images.PNG_SIGNATURE)
    assert found.dtype == torch.uint16
    assert torch.equal(found.int(), depth.int())


def test_values_of_8_bits_are_exact() -> None:
    frame = torch.randint(256, (1, 33, 41)).byte()
    content = images.encode(frame, "8-bit", 10)
    assert content.startswith(images.PNG_SIGNATURE)
    assert torch.equal(images.decode(content, "8-bit"), frame)


def test_a_strided_frame_is_the_same_picture(depth: Tensor) -> None:
    for form, frame in (("colour", ramp(3)), ("grey", ramp(1)), ("16-bit", depth)):
        transposed = frame.transpose(1, 2).contiguous().transpose(1, 2)
        assert images.encode(transposed, form, 95) == images.encode(frame, form, 95)


def test_grey_becomes_rgb_and_rgb_grey() -> None:
    grey, colour = ramp(1), ramp(3)
    found = images.decode(file_of(grey[0].numpy(), "PNG"), "colour")
    assert torch.equal(found, grey.expand(3, -1, -1))
    found = images.decode(file_of(colour.permute(1, 2, 0).numpy(), "PNG"), "grey")
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None] * colour
    assert (found - luma.sum(0)).abs().max() <= 1


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_form_of_a_file_is_told_and_strictly_kept(format: str, depth: Tensor) -> None:
    grey = file_of(ramp(1)[0].numpy(), format)
    colour = file_of(ramp(3).permute(1, 2, 0).numpy(), format)
    values = images.encode(depth, "16-bit", 95)
    assert [images.form_of(content) for content in (grey, colour, values)] == [
        *("grey", "colour", "16-bit")
    ]
    assert images.decode(grey, "grey", strict=True).shape == (1, 33, 41)
    assert images.decode(colour, "colour", strict=True).shape == (3, 33, 41)
    with pytest.raises(ValueError, match=r"^must be colour, but is 8-bit grey$"):
        images.decode(grey, "colour", strict=True)
    for form in ("grey", "8-bit"):
        with pytest.raises(ValueError, match=r"^must be 8-bit grey, but is colour$"):
            images.decode(colour, form, strict=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "kind"), [((9, 8), "8-bit grey"), ((9, 8, 3), "colour"), ((9, 8, 4), "colour")]
)
def test_depth_of_another_kind_is_refused(shape: tuple[int, ...], kind: str) -> None:
    content = file_of(np.zeros(shape, np.uint8), "PNG")
    with pytest.raises(ValueError, match=f"^must have 16 bits in one channel, but is {kind}$"):
        images.decode(content, "16-bit")


@pytest.mark.parametrize("form", ["colour", "grey", "8-bit"])
def test_depth_is_no_colour(form: images.Form, depth: Tensor) -> None:
    content = images.encode(depth, "16-bit", 95)
    with pytest.raises(ValueError, match="must have 8 bits per channel, but has 16"):
        images.decode(content, form)


def test_colours_of_16_bits_are_not_cut_to_8() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(7))), (b"IEND", b""))
    content = images.PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    for look in (images.form_of, lambda content: images.decode(content, "colour")):
        with pytest.raises(ValueError, match="must have 8 bits per channel, but has 16"):
            look(content)


@pytest.mark.parametrize("form", ["colour", "grey", "16-bit"])
def test_frames_of_another_form_are_not_encoded(form: images.Form, depth: Tensor) -> None:
    frames = {"colour": ramp(3), "grey": ramp(1), "16-bit": depth}
    for other, frame in frames.items():
        if other != form:
            with pytest.raises(ValueError, match=f"a frame in the form {form} must be torch.uint"):
                images.encode(frame, form, 95)


@pytest.mark.parametrize("content", [b"", b"text", file_of(np.zeros((9, 8), np.uint8), "BMP")])
def test_what_is_neither_jpeg_nor_png_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^cannot be decoded: "):
        images.decode(content, "colour")


def test_every_flipped_bit_of_a_png_is_found(depth: Tensor) -> None:
    """Pillow looks at no checksum of the pixels."""
    content = images.encode(depth[:, :4, :4], "16-bit", 95)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"^(is|cannot be) "):
            images.decode(bytes(flipped), "16-bit")


def test_every_truncation_is_found(depth: Tensor) -> None:
    for form, frame in (("colour", ramp(3)), ("16-bit", depth[:, :4, :4])):
        content = images.encode(frame, form, 95)
        for length in range(0, len(content) - 2, 3):
            with pytest.raises(ValueError, match=r"^(is|cannot be) "):
                images.decode(content[:length], form)
