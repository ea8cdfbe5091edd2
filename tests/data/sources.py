"""Sources of frames that need no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmixer_kernels.data.clips import Clip
from mmixer_kernels.errors import DamagedFile

CHANNELS = {"rgb": 3, "depth": 1, "ir": 1}


@dataclass(frozen=True)
class MadeSource:
    """Smooth pictures of rgb and ir, which JPEG keeps well; depth has all of its 16 bits."""

    modality: str
    frames: int
    seed: int = 0
    damaged: bool = False

    def count(self) -> int:
        return self.frames

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        if self.damaged:
            raise DamagedFile(f"{self.seed}.{self.modality}", "cannot be decoded")
        return torch.stack([self._frame(index, size) for index in indices])

    def _frame(self, index: int, size: int) -> Tensor:
        shape = CHANNELS[self.modality], size, size * 4 // 3
        if self.modality == "depth":
            random = torch.Generator().manual_seed(1000 * self.seed + index)
            return torch.randint(65536, shape, generator=random).to(torch.uint16)
        ramp = torch.linspace(0, 100, shape[2]) + 10 * (index % 14) + self.seed
        return ramp.expand(shape).byte()


def made_clips(
    count: int,
    frames: Mapping[str, int],
    damaged: tuple[int, str] | None = None,
    missing: tuple[int, str] | None = None,
) -> list[Clip]:
    """Clips with these numbers of frames by modality; a modality of one can be bad or absent."""
    return [
        Clip(
            f"clip{i:03}",
            i % 3,
            {
                modality: MadeSource(modality, n + i, i, damaged == (i, modality))
                for modality, n in frames.items()
                if missing != (i, modality)
            },
        )
        for i in range(count)
    ]
