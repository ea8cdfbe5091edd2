"""Clips of video as samples: a source of frames per modality, read, transformed and labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .base import Sample, Split, draws
from .transforms import Transform


class Source(Protocol):
    """A clip's frames of one modality, on disk."""

    def count(self) -> int:
        """The number of frames, from the header or the listing, without decoding.

        Raises:
            DamagedFile: unreadable, or no frame.
        """
        ...

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """Frames with their shorter side resized to `size` pixels, aspect kept.

        Args:
            indices: which frames, ascending; may repeat.
            size: pixels of the shorter side.

        Returns:
            rgb uint8 `[n, 3, h, w]`; ir uint8 `[n, 1, h, w]`; depth uint16 `[n, 1, h, w]` in
            millimetres, values exact (nearest neighbour).

        Raises:
            DamagedFile: unreadable, or fewer frames than the header says.
        """
        ...

    def verify(self, full: bool) -> None:
        """Looks for damage: cheaply, or in full by reading every frame.

        Raises:
            DamagedFile: there is some.
        """
        ...


@dataclass(frozen=True)
class Clip:
    """A sample on disk.

    Args:
        name: its ID, unique in its data set.
        label: its class, from 0.
        sources: its frames by modality: "rgb", "depth", "ir".
    """

    name: str
    label: int
    sources: Mapping[str, Source]


class ClipSplit(Split):
    """Clips, read anew whenever they are asked for.

    A sample's inputs are float32 `[T, 3, image_size, image_size]` per modality, T the number of
    indices that `sampling` gives. Every modality is read at the same indices, those of the one
    with the fewest frames.

    Args:
        clips: in the split's order; each has the modalities.
        modalities: in the order of a sample's inputs.
        sampling: the indices of the frames, ascending, of a clip with so many frames.
        transform: makes the inputs of the frames.
        seed: seed of the augmentation.
        training: augment the clips, each by (seed, epoch, index).
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        modalities: Sequence[str],
        sampling: Callable[[int], Sequence[int]],
        transform: Transform,
        seed: int,
        training: bool,
    ) -> None:
        super().__init__(torch.tensor([clip.label for clip in clips], dtype=torch.int64))
        self.clips, self.modalities = clips, tuple(modalities)
        self.sampling, self.transform = sampling, transform
        self.seed, self.training = seed, training
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def plain(self) -> ClipSplit:
        arguments = self.clips, self.modalities, self.sampling, self.transform, self.seed
        return ClipSplit(*arguments, training=False)

    def __getitem__(self, index: int) -> Sample:
        clip = self.clips[index]
        sources = {modality: clip.sources[modality] for modality in self.modalities}
        indices = self.sampling(min(source.count() for source in sources.values()))
        size = self.transform.read_size
        frames = {modality: source.read(indices, size) for modality, source in sources.items()}
        random = draws(self.seed, 0, self.epoch, index) if self.training else None
        return Sample(self.transform(frames, random), clip.label, len(indices))
