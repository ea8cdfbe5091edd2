"""Clips of video as samples: a source of frames per modality, read, transformed and labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import DamagedFile
from .alignment import Rule, Track, align
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

    def rate(self) -> float | None:
        """Frames per second, None where none are known.

        Raises:
            DamagedFile: unreadable.
        """
        ...

    def read(self, indices: Sequence[int], size: int) -> Tensor:
        """Frames with their shorter side resized to `size` pixels, aspect kept.

        Args:
            indices: which frames, ascending; may repeat.
            size: pixels of the shorter side.

        Returns:
            uint8 `[n, 3, h, w]` of colours, uint8 `[n, 1, h, w]` of grey and of values of 8 bits,
            uint16 `[n, 1, h, w]` of values of 16 bits, as a Kinect's depth in millimetres. Values
            are exact (nearest neighbour).

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


class Listed(NamedTuple):
    """A list's line on a sample: its `place` as "train.txt, line 3", and the number of frames that
    each modality has at least, where the line tells it."""

    place: str
    frames: int | None


@dataclass(frozen=True)
class Clip:
    """A sample on disk.

    Args:
        name: its ID, unique in its data set.
        label: its class, from 0.
        sources: its frames by modality: "rgb", "depth", "ir" or another.
        listed: the line of the list that names it, where one does.
    """

    name: str
    label: int
    sources: Mapping[str, Source]
    listed: Listed | None = None

    def track(self, modality: str, rule: Rule = "frame") -> Track:
        """A modality's number of frames and, where the rule needs it, their rate.

        Raises:
            DamagedFile: unreadable, or fewer frames than the list says.
        """
        source = self.sources[modality]
        count = source.count()
        if self.listed is not None and count < (self.listed.frames or 0):
            raise DamagedFile(
                self.listed.place,
                f"says {self.listed.frames} frames, but {self.name} has {count} of {modality}: "
                "complete them, or leave the numbers out of the list where modalities differ",
            )
        return Track(count, source.rate() if rule == "rate" else None)


class ClipSplit(Split):
    """Clips, read anew whenever they are asked for.

    A sample's inputs are float32 `[T, 3, image_size, image_size]` per modality, T the number of
    indices that `sampling` gives of the first modality's frames; which of the others' belong to
    them, `alignment` says.

    Args:
        clips: in the split's order; each has the modalities.
        modalities: in the order of a sample's inputs.
        sampling: the indices of the frames, ascending, of a clip with so many frames.
        transform: makes the inputs of the frames.
        seed: seed of the augmentation.
        training: augment the clips, each by (seed, epoch, index).
        rule: the rule of `alignment`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        modalities: Sequence[str],
        sampling: Callable[[int], Sequence[int]],
        transform: Transform,
        seed: int,
        training: bool,
        rule: Rule = "frame",
    ) -> None:
        super().__init__(torch.tensor([clip.label for clip in clips], dtype=torch.int64))
        self.clips, self.modalities = clips, tuple(modalities)
        self.sampling, self.transform = sampling, transform
        self.seed, self.training, self.rule = seed, training, rule
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def plain(self) -> ClipSplit:
        arguments = self.clips, self.modalities, self.sampling, self.transform, self.seed
        return ClipSplit(*arguments, training=False, rule=self.rule)

    def __getitem__(self, index: int) -> Sample:
        clip = self.clips[index]
        tracks = {modality: clip.track(modality, self.rule) for modality in self.modalities}
        indices = align(tracks, self.rule, self.sampling)
        size = self.transform.read_size
        frames = {
            modality: clip.sources[modality].read(chosen, size)
            for modality, chosen in indices.items()
        }
        random = draws(self.seed, 0, self.epoch, index) if self.training else None
        length = len(indices[self.modalities[0]])
        return Sample(self.transform(frames, random), clip.label, length)
