"""From a clip's frames to a network's inputs: which frames, and what becomes of their pixels.

The paper (section 4.2): temporal stride 8, "random cropping and resize each frame to 224x224",
random horizontal flipping, colour jitter of RGB, depth and IR through a jet colour map. It gives no
scale for the crop. Here it is the usual square of 224 of a shorter side of 256 pixels, and no random
scale, which would often cut the actor off. One crop, at one relative offset, and one flip are shared
by all frames and modalities of a sample, so that they stay aligned.
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
"""ImageNet's, of R, G and B in 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are read.

    Args:
        stride: every so manieth frame, from the first (the paper's is 8).
        frames: so many frames instead, evenly spaced; None for the stride.

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
        """Ascending indices in 0..count-1; clips shorter than `frames` repeat some.

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
        jitter: a training clip's brightness, contrast and saturation of RGB are each multiplied
            by a factor up to this share below or above 1.
        maximum: by modality, the value that becomes the map's last colour; the least value of
            each frame becomes the first colour and the greatest the last where there is none.

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
        """float32 `[T, 3, image_size, image_size]` a modality, in the order of `frames`.

        Args:
            frames: by modality, `[T, C, h, w]`: three channels of uint8 are RGB; one channel of
                uint8 or uint16 is coloured.
            random: the sample's draws; None for evaluation, which crops the centre.
        """
        raise NotImplementedError


def normalized(images: Tensor) -> Tensor:
    """uint8 `[T, 3, h, w]` as float32 of ImageNet's mean 0 and standard deviation 1."""
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std
