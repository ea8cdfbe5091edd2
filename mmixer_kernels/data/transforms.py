"""The way from a clip's frames to a network's inputs: which frames, and what becomes of their
pixels.

The paper (section 4.2): temporal stride 8, "random cropping and resize each frame to 224x224",
random horizontal flipping, colour jitter of RGB, depth and IR through a jet colour map. It gives
no scale for the crop. Here it is the usual square of 224 out of a shorter side of 256 pixels, and
no random scale, which would often cut the actor off. One crop, at one relative offset, and one flip
are shared by all frames and modalities of a sample, so that they stay aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

CROP = 224 / 256
"""Side of the crop as a share of the frame's shorter side."""
MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of R, G and B in 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of R, G and B in 0..1."""


@dataclass(frozen=True)
class Sampling:
    """The choice of the frames that are read of a clip.

    Args:
        stride: steps from one frame to the next, from the first on (the paper's is 8).
        frames: number of frames, evenly spaced, instead; None for the stride.

    Raises:
        ValueError: either is not 1 or more.
    """

    stride: int = 8
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("stride", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, but is {value}")

    def __call__(self, count: int) -> list[int]:
        """The indices of the frames, ascending in 0..count-1; clips shorter than `frames` repeat
        some.

        With `frames`, a clip is cut into as many equal parts and the middle of each is taken.
        """
        if self.frames is None:
            return list(range(0, count, self.stride))
        return [(2 * part + 1) * count // (2 * self.frames) for part in range(self.frames)]


@dataclass(frozen=True)
class Transform:
    """Makes a sample's inputs of its frames.

    Args:
        image_size: height and width of the inputs in pixels.
        flip: probability of a training clip's being mirrored.
        jitter: a training clip's brightness, contrast and saturation of colours are each multiplied
            by a factor up to this share below or above 1.
        maximum: by modality, the value that becomes the map's last colour, 0 the first, but no
            more than pixels of 8 bits can have; without one, each frame's least and greatest
            values do.

    Raises:
        ValueError: an argument out of its range.
    """

    image_size: int = 224
    flip: float = 0.5
    jitter: float = 0.4
    maximum: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(f"image_size must be 8 or more, but is {self.image_size}")
        for name in ("flip", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, but is {getattr(self, name)}")

    @property
    def read_size(self) -> int:
        """The shorter side in pixels of the frames that the crop is made for: 256 for 224."""
        return round(self.image_size / CROP)

    def __call__(
        self, frames: Mapping[str, Tensor], random: np.random.Generator | None
    ) -> tuple[Tensor, ...]:
        """The inputs, float32 `[T, 3, image_size, image_size]` per modality, in `frames`' order.

        Args:
            frames: by modality, `[T, C, h, w]`: three channels of uint8 are RGB; one channel of
                uint8 or uint16 is coloured.
            random: the sample's draws; None for evaluation, which crops the centre.
        """
        offsets, flipped = np.array((0.5, 0.5)), False
        factors = np.ones(3)
        if random is not None:
            offsets, flipped = random.random(2), random.random() < self.flip
            factors += self.jitter * random.uniform(-1, 1, 3)
        inputs = []
        for modality, pictures in frames.items():
            if pictures.shape[1] == 1:
                pictures = eight_bits(pictures, self.maximum.get(modality))
            images = _crop(pictures, offsets)
            if images.shape[1] == 1:
                images = jet(images)
            elif self.jitter and random is not None:
                images = _jittered(images, factors)
            if images.shape[-1] != self.image_size:
                images = _resized(images, self.image_size)
            inputs.append(normalized(images.flip(-1) if flipped else images))
        return tuple(inputs)


def eight_bits(pictures: Tensor, maximum: int | None = None) -> Tensor:
    """Pictures of one channel `[T, 1, h, w]` as uint8: 0 to `maximum`, or each frame's least to
    greatest value, becomes 0 to 255."""
    values = pictures.int()
    most = torch.iinfo(pictures.dtype).max
    least, greatest = torch.zeros((), dtype=torch.int32), torch.tensor(min(maximum or 0, most))
    if maximum is None:
        least, greatest = values.amin((1, 2, 3), True), values.amax((1, 2, 3), True)
    span = (greatest - least).clamp(min=1)  # a frame of one value becomes 0
    return ((510 * (values - least) + span) // (2 * span)).clamp(max=255).byte()


def jet(pictures: Tensor) -> Tensor:
    """Pictures uint8 `[T, 1, h, w]` as RGB uint8 `[T, 3, h, w]`: 0 is dark blue, 255 dark red."""
    return JET[pictures[:, 0].long()].permute(0, 3, 1, 2)


def _jet() -> Tensor:
    """The colour map `[256, 3]`: each colour rises, stays and falls over a quarter of the map."""
    value = torch.arange(256)[:, None] / 255
    return (255 * (1.5 - (4 * value - torch.tensor((3, 2, 1))).abs()).clamp(0, 1)).round().byte()


JET = _jet()


def _crop(pictures: Tensor, offsets: np.ndarray) -> Tensor:
    """A square of the pictures at `offsets` (down, right) in 0..1 of the room there is."""
    height, width = pictures.shape[-2:]
    side = round(CROP * min(height, width))
    top, left = (round(o * (x - side)) for o, x in zip(offsets, (height, width), strict=True))
    return pictures[..., top : top + side, left : left + side]


def _jittered(images: Tensor, factors: np.ndarray) -> Tensor:
    """RGB pictures whose brightness, contrast and saturation are multiplied by `factors`."""
    from torchvision.transforms.v2 import functional

    adjustments = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    for adjust, factor in zip(adjustments, factors.tolist(), strict=True):
        images = adjust(images, factor)
    return images


def _resized(images: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.resize(images, [size, size], antialias=True)


def normalized(images: Tensor) -> Tensor:
    """Pictures uint8 `[T, 3, h, w]` as float32, in which ImageNet has mean 0 and standard deviation
    1."""
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std
