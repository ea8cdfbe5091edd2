"""Synthetic action clips on which what each stream can know is exact.

A body crosses the frame, and every stream sees the gesture, the direction of its path. Each
stream also sees one attribute of the body, to which the other streams are blind:

    stream   frames          sees                                   attribute
    rgb      [T, 3, S, S]    red or blue of the same brightness     colour
    depth    [T, 1, S, S]    in front of or behind a plane          side
    ir       [T, 1, S, S]    colder or warmer than its surroundings warmth

Every scene, one draw of the gesture, the path, the surroundings and the noise, is filmed once for
each of the 2^N combinations of the N streams' attributes. A stream's clips of a scene in which its
own attribute is the same are therefore equal to the last bit, whatever the other attributes are
(the camera is orthographic: the side changes neither size nor place, and nothing hides the body).
So what follows holds on every split as it is, not only in expectation.

Task `combine`: label = gesture and every attribute, 4 x 2^N classes. Clips that n streams cannot
tell apart come in groups of 2^(N-n), each with a label of its own, and get one answer: at most
1/2^(N-n) of all clips are right. One of two streams reaches 50 %, one of three 25 %.

Task `compare`: label = gesture and whether each further attribute agrees with the first stream's
(red, front and cold agree, and blue, behind and warm), 4 x 2^(N-1) classes.

- One stream alone: the same groups, and in a group each label of a gesture is as frequent as the
  others. At most 1/2^(N-1) are right: 50 % with two streams.
- Added scores, such as a linear classifier's on concatenated streams that have not mixed: at most
  75 % with two streams, 62.5 % with three. Each label of a scene's gesture has two clips, opposite
  in every attribute. Every sum over the streams is the same for one such pair of clips as for any
  other, for it has each stream's two scores once. If both clips of label k are right, its score is
  above every other label's in both, so its sum is too; this can be true of only one k. Of the
  2^(N-1) labels only one has both clips right: at most (2^(N-1) + 1) / 2^N.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .base import Data, Sample, Split, draws

GESTURES = {
    "left-right": (1.0, 0.0),
    "right-left": (-1.0, 0.0),
    "up-down": (0.0, 1.0),
    "down-up": (0.0, -1.0),
}
"""Direction of the path as (x, y), y downwards."""


class Stream(NamedTuple):
    """A camera: the attribute it sees, and how each value changes its channels at the body."""

    attribute: str
    values: tuple[str, str]
    contrast: tuple[tuple[float, ...], tuple[float, ...]]


STREAMS = {
    "rgb": Stream("colour", ("red", "blue"), ((1.0, -0.5, -0.5), (-0.5, -0.5, 1.0))),
    "depth": Stream("side", ("front", "behind"), ((-1.0,), (1.0,))),
    "ir": Stream("warmth", ("cold", "warm"), ((-1.0,), (1.0,))),
}

FEATURE_SIZE = 64
KEPT_BYTES = 1 << 28
"""Memory that a split may keep scenes in, of whose clips all but the first then cost little."""


@dataclass(frozen=True)
class SyntheticOptions:
    """The data set `synthetic`: generated clips of a moving body."""

    task: Literal["combine", "compare"] = "combine"
    """The part of the label besides the gesture: every attribute, or which of them agree."""
    modalities: tuple[Literal["rgb", "depth", "ir"], ...] = ("rgb", "depth")
    """The streams, two or three."""
    frame_size: int = 16
    """Height and width of a frame in pixels."""
    frames: int = 8
    """Frames per clip."""
    speed: float = 0.5
    """Distance that the body moves in a clip, as a share of the frame; scenes vary it by 25 %."""
    noise: float = 0.1
    """Standard deviation of the noise on each pixel; the body's contrast is 0.5 to 0.8."""
    samples: int = 4096
    """Training clips per epoch; each epoch has new ones."""
    evaluation_samples: int = 1024
    """Clips for validation, and again for the test."""

    recipe: ClassVar[dict[str, object]] = {
        "epochs": 10,
        "model.hidden_size": 128,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 1.0,
        "loader.batch_size": 64,
    }

    def load(self, root: Path | None, seed: int) -> Data:
        """Makes clips that are determined by seed, split, epoch and index.

        Raises:
            ValueError: an option out of its range, or a root: there are no files to read.
        """
        self._check(root)
        return Data(
            modalities=self.modalities,
            classes=self._classes(),
            train=SyntheticSplit(self, (seed, 0), self.samples),
            validation=SyntheticSplit(self, (seed, 1), self.evaluation_samples),
            test=SyntheticSplit(self, (seed, 2), self.evaluation_samples),
            extractors=[
                FrameExtractor(len(STREAMS[name].contrast[0]), self.frame_size, FEATURE_SIZE)
                for name in self.modalities
            ],
            feature_sizes=(FEATURE_SIZE,) * len(self.modalities),
            steps=self.frames,
        )

    def label(self, gesture: int, attributes: Sequence[int]) -> int:
        """The class of a gesture with an attribute (0 or 1) a stream."""
        bits = attributes
        if self.task == "compare":
            bits = [attribute ^ attributes[0] for attribute in attributes[1:]]
        return int(np.ravel_multi_index((gesture, *bits), (len(GESTURES),) + (2,) * len(bits)))

    def _classes(self) -> tuple[str, ...]:
        words = [STREAMS[name].values for name in self.modalities]
        if self.task == "compare":
            words = [("agree", "differ")] * (len(words) - 1)
        return tuple(" ".join(names) for names in itertools.product(GESTURES, *words))

    def _check(self, root: Path | None) -> None:
        if root is not None:
            raise ValueError(f"root must be left out for synthetic clips, but is {str(root)!r}")
        if self.task not in ("combine", "compare"):
            raise ValueError(f"task must be combine or compare, but is {self.task!r}")
        names = self.modalities
        if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= STREAMS.keys():
            raise ValueError(
                f"modalities must be two or three of {', '.join(STREAMS)}, "
                f"each once, but are {' '.join(names)!r}"
            )
        for name, least in (("frame_size", 8), ("frames", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, but is {getattr(self, name)}")
        if not 0 < self.speed <= 0.5:
            raise ValueError(f"speed must be above 0 and at most 0.5, but is {self.speed}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be 0 or more and finite, but is {self.noise}")
        scenes = len(GESTURES) * 2 ** len(names)
        for name in ("samples", "evaluation_samples"):
            count = getattr(self, name)
            if count < 1 or count % scenes:
                raise ValueError(
                    f"{name} must be a positive multiple of {scenes}, each gesture with each "
                    f"combination of attributes, but is {count}"
                )


class SyntheticSplit(Split):
    """Clips of one split; clip `index` is scene `index // 2^N` with attributes `index % 2^N`.

    Args:
        options: what to render.
        key: seed and number of the split.
        samples: number of clips.
    """

    def __init__(self, options: SyntheticOptions, key: tuple[int, int], samples: int) -> None:
        self.options, self.key, self.epoch = options, key, 0
        self.kept: dict[int, _Scene] = {}
        self.combinations = list(itertools.product((0, 1), repeat=len(options.modalities)))
        super().__init__(
            torch.tensor([options.label(*self.gesture_and_attributes(i)) for i in range(samples)])
        )

    def set_epoch(self, epoch: int) -> None:
        if self.key[1] == 0 and epoch != self.epoch:
            self.epoch, self.kept = epoch, {}

    def gesture_and_attributes(self, index: int) -> tuple[int, tuple[int, ...]]:
        """The contents of clip `index`: the gesture's number, and 0 or 1 per stream."""
        scene, combination = divmod(index, len(self.combinations))
        return scene % len(GESTURES), self.combinations[combination]

    def __getitem__(self, index: int) -> Sample:
        gesture, attributes = self.gesture_and_attributes(index)
        number = index // len(self.combinations)
        scene = self.kept.get(number)
        if scene is None:
            scene = self._scene(number, gesture)
            if (len(self.kept) + 1) * scene.size <= KEPT_BYTES:
                self.kept[number] = scene
        streams = [
            torch.from_numpy(background + scene.body * contrasts[value])
            for (background, contrasts), value in zip(scene.streams, attributes, strict=True)
        ]
        return Sample(tuple(streams), int(self.labels[index]), self.options.frames)

    def _scene(self, number: int, gesture: int) -> _Scene:
        options = self.options
        body = _body(options, gesture, draws(*self.key, self.epoch, number))
        streams = []
        for name in options.modalities:
            purpose = 1 + list(STREAMS).index(name)
            random = draws(*self.key, self.epoch, number, purpose)
            streams.append(_background(STREAMS[name], body.shape, options.noise, random))
        return _Scene(body, streams)


class FrameExtractor(nn.Module):
    """Convolutions on each frame: `[B, T, C, S, S] -> [B, T, feature_size]`."""

    def __init__(self, channels: int, frame_size: int, feature_size: int) -> None:
        super().__init__()
        side = (frame_size + 3) // 4
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, feature_size),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, T, feature_size]` of frames `[B, T, C, S, S]`."""
        return self.layers(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def _body(options: SyntheticOptions, gesture: int, random: np.random.Generator) -> np.ndarray:
    """The share of each pixel that the body covers, `[T, 1, S, S]` in 0..1: an upright ellipse."""
    direction = np.array(list(GESTURES.values())[gesture])
    uniform = random.random(5)
    radius = np.array((0.09, 0.13)) + np.array((0.04, 0.05)) * uniform[:2]
    travel = direction * (options.speed * (0.75 + 0.5 * uniform[2]))
    margin = np.abs(travel) / 2 + radius
    middle = margin + (1 - 2 * margin) * uniform[3:]
    time = np.arange(options.frames) / (options.frames - 1) - 0.5
    centre = middle + time[:, None] * travel
    pixel = (np.arange(options.frame_size) + 0.5) / options.frame_size
    square = (1.5 * ((pixel - centre[:, :, None]) / radius[:, None]) ** 2).astype(np.float32)
    cover = 2 - square[:, 0, None] - square[:, 1, :, None]
    return cover.clip(0, 1)[:, None]


class _Scene(NamedTuple):
    """The common part of a scene's clips: `body` as `_body` has it, and each stream's
    `_background`."""

    body: np.ndarray
    streams: list[tuple[np.ndarray, np.ndarray]]

    @property
    def size(self) -> int:
        """The bytes of the arrays."""
        return self.body.nbytes + sum(frames.nbytes for frames, _ in self.streams)


def _background(
    stream: Stream, shape: tuple[int, ...], noise: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A stream's frames `[T, C, S, S]` without the body, surroundings that change evenly across the
    frame and noise; and what the body adds for each value of the attribute, `[2, C, 1, 1]`.

    Args:
        shape: that of the body, `[T, 1, S, S]`.
    """
    steps, _, size, _ = shape
    channels = len(stream.contrast[0])
    frames = random.standard_normal((steps, channels, size, size), dtype=np.float32)
    uniform = random.random((1 + 3 * channels, 1, 1), dtype=np.float32)
    level, slope_x, slope_y = 0.2 * uniform[1:].reshape(3, channels, 1, 1) - 0.1
    pixel = np.arange(size, dtype=np.float32) / size - 0.5
    contrasts = (0.5 + 0.3 * uniform[0]) * np.array(stream.contrast, np.float32)[..., None, None]
    frames *= noise
    frames += 0.5 + level + slope_x * pixel + slope_y * pixel[:, None]
    return frames, contrasts
