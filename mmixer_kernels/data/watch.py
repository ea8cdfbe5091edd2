"""Shoulder exercises recorded by a smart watch: real accelerometer and gyroscope data.

140 recordings at 50 Hz, 10 people each doing 7 exercises with either arm (Burns et al.,
arXiv:1802.01489), as the package `seglearn` carries them. A sample is a window of 4 seconds. The
protocol is across subjects: 8 to 10 are for the test, one of 1 to 7 for validation, the others
for training. `--test-subjects` chooses others for the test: `1 2`, `3 4`, ..., `9 10` are five
folds by subject.

The recipe takes a fixed number of steps, 30 epochs of 40, and tests the last weights: validation
shows how training goes and chooses nothing. The recipe was found by cross-validation within
subjects 1 to 7, and its learning rate is M-Mixer's and the GRU's; `--model.content self` is best
with `--optimizer.learning-rate 2e-3`. The cross-validation's best for `--model.unit gru` was a
finer extractor, `--stride 2 --epochs 25`. All that is of the default subjects and modalities.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .base import Data, Sample, Split, draws

MODALITIES = {
    "sensors": ("accelerometer", "gyroscope"),
    "gravity": ("gravity", "linear_acceleration", "gyroscope"),
    "axes": (
        "accelerometer_x",
        "accelerometer_y",
        "accelerometer_z",
        "gyroscope_x",
        "gyroscope_y",
        "gyroscope_z",
    ),
}
"""The parts that `--modalities` divides a window into."""
CLASSES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
SUBJECTS = tuple(range(1, 11))
WINDOW = 200
"""Steps per window: 4 seconds."""
GRAVITY_WINDOW = 51
"""Number of steps that gravity is the mean over: one second, and odd to have a middle."""
HOP = 100
"""Steps between the starts of two windows of a recording."""

FEATURE_SIZE = 64
MIRROR = np.array((-1, 1, 1, 1, -1, -1), np.float32)
"""The signs of what the other arm records: acceleration is a vector, angular velocity an axial one,
so x flips of the first, y and z of the second."""


@dataclass(frozen=True)
class WatchOptions:
    """The data set `watch`: shoulder exercises recorded by a smart watch."""

    test_subjects: tuple[int, ...] = (8, 9, 10)
    """Subjects of 1 to 10 that are tested on; the others are for training and validation."""
    validation_subject: int | None = 4
    """Subject of the others that is left out of training, to validate on; 4 has the shortest
    recordings, so the least is left out. None trains on all of them and validates on the same
    recordings, which shows nothing of other people and must choose nothing: --select last."""
    modalities: Literal["sensors", "gravity", "axes"] = "sensors"
    """Two modalities, accelerometer and gyroscope; three, the acceleration divided into gravity
    (its mean over one second) and the rest; or six, each axis of each sensor."""
    exclude_subjects: tuple[int, ...] | None = None
    """Subjects that are neither trained nor tested on, as is due where options are chosen by the
    others; None excludes nobody."""
    samples: int = 1280
    """Training windows per epoch."""
    stride: int = 4
    """Stride of the second convolution: the 50 steps that the first one gives become 13 with 4, 25
    with 2."""
    same_arm: bool = False
    """Mirror the recordings of one arm, the test's too, as if all were of the other: a watch's
    settings tell which arm it is on. Goes with --mirror 0."""
    tempo: float = 1.2
    """Greatest factor by which training windows are played faster or slower."""
    mirror: float = 0.5
    """Probability of seeing a training window as on the other arm."""
    tilt: float = 10.0
    """Standard deviation of each component of the watch's rotation vector, in degrees."""
    roll: float = 10.0
    """Standard deviation of a further turn about the forearm, in degrees."""
    gain: float = 0.2
    """Standard deviation of the logarithm of each sensor's gain."""
    jitter: float = 0.05
    """Standard deviation of white noise on the normalised signals."""

    recipe: ClassVar[dict[str, object]] = {
        "epochs": 30,
        "select": "last",
        "model.hidden_size": 64,
        "model.feature_dropout": 0.1,
        "model.dropout": 0.2,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 4e-3,
        "optimizer.weight_decay": 0.02,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 1.25,
        "optimizer.label_smoothing": 0.1,
        "loader.batch_size": 32,
    }

    def load(self, root: Path | None, seed: int) -> Data:
        """Reads the recordings out of the installed package `seglearn`.

        Args:
            root: None: the package has the file.
            seed: seed of the augmentation.

        Raises:
            ModuleNotFoundError: seglearn is not installed.
            ValueError: an option out of its range, or a root.
        """
        self._check(root)
        recordings = _read()
        if self.same_arm:
            recordings = [recording.on_first_arm() for recording in recordings]
        held_out = self.validation_subject
        train = _of_subjects(recordings, [s for s in self._others() if s != held_out])
        scale = _scale(train)
        validation = train if held_out is None else _of_subjects(recordings, [held_out])
        test = _of_subjects(recordings, self.test_subjects)
        modalities = MODALITIES[self.modalities]
        channels = 1 if self.modalities == "axes" else 3
        return Data(
            modalities=modalities,
            classes=CLASSES,
            train=AugmentedWindows(train, scale, self, seed),
            validation=Windows(validation, scale, self.modalities),
            test=Windows(test, scale, self.modalities),
            extractors=[SignalExtractor(channels, FEATURE_SIZE, self.stride) for _ in modalities],
            feature_sizes=(FEATURE_SIZE,) * len(modalities),
            steps=WINDOW,
        )

    def _others(self) -> list[int]:
        left_out = {*self.test_subjects, *(self.exclude_subjects or ())}
        return [subject for subject in SUBJECTS if subject not in left_out]

    def _check(self, root: Path | None) -> None:
        if root is not None:
            raise ValueError(
                f"root must be left out for watch, which is in a package, but is {str(root)!r}"
            )
        self._check_subjects()
        if self.modalities not in MODALITIES:
            raise ValueError(
                f"modalities must be one of {', '.join(MODALITIES)}, but is {self.modalities!r}"
            )
        for name in ("samples", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but is {getattr(self, name)}")
        if not 1 <= self.tempo <= 4:
            raise ValueError(f"tempo must be in 1..4, but is {self.tempo}")
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror must be in 0..1, but is {self.mirror}")
        for name in ("tilt", "roll", "gain", "jitter"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be 0 or more and finite, but is {getattr(self, name)}"
                )

    def _check_subjects(self) -> None:
        tested, others = self.test_subjects, self._others()
        valid = tested and len(set(tested)) == len(tested) and set(tested) <= set(SUBJECTS)
        if not valid:
            raise ValueError(
                "test_subjects must be one or more of 1..10, each of them once, "
                f"but is {_listed(tested) or 'empty'}"
            )
        excluded = self.exclude_subjects or ()
        if not set(excluded) <= set(SUBJECTS) - set(tested):
            raise ValueError(
                "exclude_subjects must be of 1..10 without those tested on, but are "
                f"{_listed(excluded)}, and tested on are {_listed(tested)}"
            )
        if self.validation_subject not in (None, *others):
            raise ValueError(
                f"validation_subject must be one of the subjects not tested on ({_listed(others)}) "
                f"or None, but is {self.validation_subject}: choose another or None"
            )
        if not set(others) - {self.validation_subject}:
            raise ValueError(
                "test_subjects, exclude_subjects and validation_subject must leave someone to "
                f"train on, but are {_listed(tested)}; {_listed(excluded) or None}; and "
                f"{self.validation_subject}"
            )


class Recording(NamedTuple):
    """A recording of an exercise of one arm: signal `[steps, 6]` float32, acceleration then angular
    velocity."""

    signal: np.ndarray
    label: int
    subject: int
    arm: int

    def on_first_arm(self) -> Recording:
        """The same movement as arm 0 would have recorded it."""
        return self if self.arm == 0 else self._replace(signal=self.signal * MIRROR, arm=0)


class Windows(Split):
    """The windows of the recordings at a fixed hop, normalised.

    Args:
        recordings: the recordings to cut.
        scale: `[6]`, the divisors of the signals.
        modalities: a key of MODALITIES.
    """

    def __init__(self, recordings: Sequence[Recording], scale: np.ndarray, modalities: str) -> None:
        self.recordings, self.scale, self.modalities = recordings, scale, modalities
        self.windows = [
            (number, start)
            for number, recording in enumerate(recordings)
            for start in range(0, len(recording.signal) - WINDOW + 1, HOP)
        ]
        super().__init__(torch.tensor([recordings[number].label for number, _ in self.windows]))

    def __getitem__(self, index: int) -> Sample:
        number, start = self.windows[index]
        signal = self.recordings[number].signal[start : start + WINDOW] / self.scale
        return _sample(signal, int(self.labels[index]), self.modalities)


class AugmentedWindows(Split):
    """Windows from anywhere in the recordings, varied as wearers and watches vary.

    An epoch draws its windows' recordings anew, each in proportion to its length: `labels` are
    those of the chosen epoch.
    """

    def __init__(
        self, recordings: Sequence[Recording], scale: np.ndarray, options: WatchOptions, seed: int
    ) -> None:
        self.recordings, self.scale, self.options, self.seed = recordings, scale, options, seed
        super().__init__(torch.zeros(options.samples, dtype=torch.int64))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        lengths = np.array([len(recording.signal) for recording in self.recordings])
        random = draws(self.seed, 0, epoch, 0, purpose=1)
        self.numbers = random.choice(len(lengths), len(self), p=lengths / lengths.sum())
        self.labels = torch.tensor([self.recordings[number].label for number in self.numbers])

    def plain(self) -> Windows:
        return Windows(self.recordings, self.scale, self.options.modalities)

    def __getitem__(self, index: int) -> Sample:
        options, random = self.options, draws(self.seed, 0, self.epoch, index)
        recording = self.recordings[self.numbers[index]]
        signal = _stretched(recording.signal, options.tempo ** random.uniform(-1, 1), random)
        if random.random() < options.mirror:
            signal = signal * MIRROR
        roll = _rotation(np.array((options.roll * random.standard_normal(), 0, 0)))
        turn = roll @ _rotation(options.tilt * random.standard_normal(3))
        signal = (signal.reshape(-1, 3) @ turn.T).reshape(-1, 6)
        gain = np.exp(options.gain * random.standard_normal(2)).repeat(3)
        noise = random.standard_normal(signal.shape, dtype=np.float32)
        signal = signal * (gain / self.scale) + options.jitter * noise
        return _sample(signal, int(self.labels[index]), options.modalities)


class SignalExtractor(nn.Module):
    """Convolutions along time: `[B, T, channels] -> [B, T', feature_size]`.

    T' is T divided by 4 and by the second convolution's stride, each time rounded up.
    """

    def __init__(self, channels: int, feature_size: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, 32, 9, stride=4, padding=4, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, feature_size, 5, stride=stride, padding=2, bias=False),
            nn.BatchNorm1d(feature_size),
            nn.ReLU(),
        )

    def forward(self, signal: Tensor) -> Tensor:
        """Features `[B, T', feature_size]` of a signal `[B, T, channels]`."""
        return self.layers(signal.transpose(1, 2)).transpose(1, 2)


def _read() -> list[Recording]:
    package = importlib.util.find_spec("seglearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the data set watch is read from the package seglearn, which is not installed: "
            "pip install 'mmixer_kernels[watch]'"
        )
    path = Path(package.origin).with_name("data") / "watch_dataset.npy"
    # Unpickling can run code: no more than importing this installed package would.
    content = np.load(path, allow_pickle=True).item()
    return [
        Recording(np.asarray(signal, np.float32), int(label), int(subject), int(arm))
        for signal, label, subject, arm in zip(
            content["X"], content["y"], content["subject"], content["side"], strict=True
        )
    ]


def _of_subjects(recordings: Sequence[Recording], subjects: Sequence[int]) -> list[Recording]:
    return [recording for recording in recordings if recording.subject in subjects]


def _scale(recordings: Sequence[Recording]) -> np.ndarray:
    """Each sensor's root mean square over steps and axes, `[6]`.

    No mean is taken off and axes share a scale: gravity's direction says how the arm is held, and
    a turned watch's signals must stay a turn of the signals.
    """
    steps = np.concatenate([recording.signal for recording in recordings]).astype(np.float64)
    return np.sqrt(np.square(steps.reshape(-1, 2, 3)).mean((0, 2))).repeat(3)


def _stretched(signal: np.ndarray, tempo: float, random: np.random.Generator) -> np.ndarray:
    """A window `[WINDOW, 6]` from anywhere in the signal, played `tempo` times as fast."""
    start = random.random() * (len(signal) - 1 - tempo * (WINDOW - 1))
    time = start + tempo * np.arange(WINDOW)
    step = np.minimum(time.astype(np.int64), len(signal) - 2)
    part = (time - step)[:, None]
    return signal[step] * (1 - part) + signal[step + 1] * part


def _rotation(degrees: np.ndarray) -> np.ndarray:
    """The matrix `[3, 3]` of a turn about the direction of `degrees` [3], by its length."""
    x, y, z = np.radians(degrees)
    cross = np.array(((0, -z, y), (z, 0, -x), (-y, x, 0)))
    angle = max(math.hypot(x, y, z), 1e-9)
    sine, versine = math.sin(angle) / angle, (1 - math.cos(angle)) / angle**2
    return np.eye(3) + sine * cross + versine * cross @ cross


def _sample(signal: np.ndarray, label: int, modalities: str) -> Sample:
    steps = torch.from_numpy(signal.astype(np.float32))
    inputs = steps.split(1 if modalities == "axes" else 3, dim=1)
    if modalities == "gravity":
        acceleration, rotation = inputs
        gravity = _gravity(acceleration)
        inputs = (gravity, acceleration - gravity, rotation)
    return Sample(inputs, label, WINDOW)


def _gravity(acceleration: Tensor) -> Tensor:
    """The mean `[T, 3]` over GRAVITY_WINDOW steps about each step, near the ends over those of them
    that the window has."""
    means = nn.functional.avg_pool1d(
        acceleration.T, GRAVITY_WINDOW, 1, GRAVITY_WINDOW // 2, count_include_pad=False
    )
    return means.T


def _listed(subjects: Sequence[int]) -> str:
    return ", ".join(map(str, subjects))
