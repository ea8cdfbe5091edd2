"""The options of a training run, as dataclasses; `parsing` fills them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..data import Data
from ..engines import names

DEFAULT_DATA = "synthetic"
Precision = Literal["float32", "bfloat16", "float16"]
NOT_IN_FILES = ("output", "config", "resume", "check", "profile", "plots")
"""The options of a run that a configuration does not hold: they are of one call of the command."""


@dataclass(frozen=True)
class ModelOptions:
    """The network: MMixer's arguments, and dropout."""

    hidden_size: int = 512
    """d_h, the size of a recurrent state."""
    unit: Literal["mcu", "gru", "lstm"] = "mcu"
    """Recurrent unit (Table 2): gru and lstm get no action content."""
    summarizer: Literal["avg", "max", "gru"] = "avg"
    """Action summarizing operator (Table 1)."""
    content: Literal["cross", "self", "none"] = "cross"
    """Action content that an MCU gets: the other modalities', its own (Table 4), or none."""
    mix: Literal["gated", "concat"] = "gated"
    """Cross-modality mix-module: Eq. 9-10, or concatenation (Table 3)."""
    layer_norm: bool = True
    """LayerNorm in the MCU (Table 3)."""
    init: Literal["uniform", "orthogonal"] = "uniform"
    """Initial values of the MCU's recurrent weights: uniform as in nn.GRU, or orthogonal
    matrices."""
    engine: str = "auto"
    """Engine that computes the MCU; python -m mmixer_kernels.info tells which there are and which
    can run here."""
    extractor: str = "auto"
    """Network of each modality's frames, by torchvision's name: one of images, for each frame by
    itself, or one of video, which joins frames (r3d_18, r2plus1d_18 and s3d make 2 steps of 16
    frames, mvit_v2_s and swin3d_t 8, mc3_18 16) and needs --frames. auto is resnet18. Other data
    sets bring extractors of their own, for which only auto is valid."""
    weights: str = "auto"
    """Initial weights of the networks of frames: imagenet (for those of images), kinetics400 (for
    those of video) or pretrained (torchvision's default), downloaded once; the path of a file with
    torchvision's names; or none, random weights. auto is imagenet or kinetics400. A checkpoint
    brings its own."""
    gradient_checkpointing: bool = False
    """Compute the insides of the extractors' blocks again in backward instead of keeping them: less
    memory, more time, the same result."""
    feature_dropout: float = 0.0
    """Fraction of the extracted features dropped in training."""
    dropout: float = 0.0
    """Fraction of the joint state dropped before the classifier in training."""
    sync_batch_norm: bool = False
    """Batch norm's statistics over the samples of all processes, on GPUs; otherwise each process
    has its own, and the first one's running statistics are kept."""

    def __post_init__(self) -> None:
        _check(self.hidden_size >= 1, "--model.hidden-size", self.hidden_size, "1 or more")
        engines = ("auto", *names())
        expected = f"one of {', '.join(engines)}"
        _check(self.engine in engines, "--model.engine", self.engine, expected)
        for name in ("feature_dropout", "dropout"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"--model.{name}", value, "at least 0 and below 1")


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer, schedule and loss."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam (weight decay in the gradient) or AdamW (decoupled)."""
    learning_rate: float = 1e-4
    """The rate after warm-up; the paper's is 1e-4."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate after warm-up: the same, or down to 0 at the last step."""
    extractor_rate: float | None = None
    """The extractors' own rate after warm-up, on the same schedule; None is the learning rate. 0
    freezes them: they stay as they are, in evaluation mode, and cost no memory for backward."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises from 0; fractions are allowed."""
    weight_decay: float = 0.0
    """Weight decay of the matrices; biases, norms and embeddings do not decay."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 for no limit."""
    label_smoothing: float = 0.0
    """Fraction of the target spread over all classes."""
    accumulate: int = 1
    """Batches whose gradients are added up before an update of the weights."""

    def __post_init__(self) -> None:
        finite = math.isfinite(self.learning_rate) and self.learning_rate > 0
        _check(finite, "--optimizer.learning-rate", self.learning_rate, "positive and finite")
        for name in ("extractor_rate", "warmup_epochs", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            valid = value is None or 0 <= value < math.inf
            _check(valid, f"--optimizer.{name}", value, "0 or more, and finite")
        valid = 0 <= self.label_smoothing < 1
        _check(valid, "--optimizer.label-smoothing", self.label_smoothing, "at least 0 and below 1")
        _check(self.accumulate >= 1, "--optimizer.accumulate", self.accumulate, "1 or more")


@dataclass(frozen=True)
class LossOptions:
    """The training loss; validation and test have the plain cross-entropy."""

    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the samples' losses in training: none, or balanced, a weight per class, inversely
    proportional to the class's training samples, whose mean over the samples is 1. The losses of
    validation and test have none."""


@dataclass(frozen=True)
class LoaderOptions:
    """Batches and the processes that load them."""

    batch_size: int = 8
    """Samples per batch of one process, in training and in evaluation; the paper's is 8.
    An update has batch_size x processes x --optimizer.accumulate of them."""
    workers: int = 0
    """Processes that load samples; 0 is the training process alone. It changes no result."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "--loader.batch-size", self.batch_size, "1 or more")
        _check(self.workers >= 0, "--loader.workers", self.workers, "0 or more")


@dataclass(frozen=True)
class TrainingLoaderOptions(LoaderOptions):
    """Batches, the processes that load them, and the samples of an epoch."""

    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Training samples of an epoch: each once, shuffled; or balanced, as many, of which each class
    has the same share: samples of rare classes come several times, those of frequent ones not in
    every epoch."""


@dataclass(frozen=True)
class RunOptions:
    """The options of every run."""

    data: str = DEFAULT_DATA
    """Data set; it brings options and a recipe of its own."""
    root: Path | None = None
    """Folder of the data set's files, for data sets that have files."""
    output: Path | None = None
    """Folder of the run; when None, runs/DATA-SEED."""
    config: Path | None = None
    """TOML file of options, as a run's config.toml, or the name of a recipe in the package; the
    command line wins over it."""
    epochs: int = 30
    """Passes over the training set."""
    select: Literal["best", "last"] = "best"
    """Epoch whose weights are tested: the best on validation, or the last."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and dropout."""
    device: str = "auto"
    """Device of the network, as PyTorch names it; cuda is a GPU each for several processes. auto is
    cuda where there is a GPU, and cpu elsewhere."""
    precision: Precision = "float32"
    """Autocast of the network's arithmetic; weights stay float32, and float16's loss is scaled."""
    compile: bool = False
    """Compile the network by torch.compile."""
    channels_last: bool = False
    """Keep the weights of 2-D convolutions, and with them their outputs, channels last in memory:
    faster on GPUs in bfloat16 and float16."""
    init_from: Path | None = None
    """Checkpoint, best.pt or last.pt, of another run whose weights this one starts from, in the
    place of --model.weights; the classifier starts anew where the classes are others. --resume does
    not read it again."""
    checkpoint_steps: int = 0
    """Write last.pt also after every this many updates; 0 writes it at the end of an epoch only."""
    validate_every: int = 1
    """Epochs from one validation to the next; the last epoch has one in any case, which stays where
    --resume adds epochs, so that it can be the best one."""
    resume: bool = False
    """Go on from last.pt of --output, with its config.toml where there is no --config."""
    check: tuple[Literal["full"], ...] | None = None
    """Look for missing and damaged files of a data set of video, count its samples, and train
    nothing; --check full decodes every frame."""
    plots: bool = True
    """Draw the learning curves, the confusion matrix and the accuracy by class at the end."""
    profile: int = 0
    """Time the parts of this many steps, and print a table of them at the end: data, extractors,
    recurrence, backward, optimizer, and what a validation and a checkpoint take."""
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    loader: TrainingLoaderOptions = field(default_factory=TrainingLoaderOptions)

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        _check(self.seed >= 0, "--seed", self.seed, "0 or more")
        for name in ("checkpoint_steps", "profile"):
            value = getattr(self, name)
            _check(value >= 0, f"--{name}", value, "0 or more")
        _check(self.validate_every >= 1, "--validate-every", self.validate_every, "1 or more")
        if self.loss.class_weights == self.loader.sampling == "balanced":
            raise ValueError(
                "--loss.class-weights must be none with --loader.sampling balanced, but is "
                "balanced: either gives each class the same share, and both give rare ones more"
            )


def automatic_device() -> str:
    """The device that `auto` stands for here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class DataOptions(Protocol):
    """The options of a data set: a dataclass with a `recipe`."""

    def load(self, root: Path | None, seed: int) -> Data:
        """Reads the data set under `root`, or makes it, with `seed` for all that is random."""
        ...


@dataclass(frozen=True)
class Options:
    """All options of a run."""

    run: RunOptions
    data: DataOptions
    device_is_automatic: bool = False
    """Whether --device was auto, and `run.device` is what that stands for here."""

    def with_device(self) -> Options:
        """The options with the device that the run has, which config.toml holds, in the place of
        auto."""
        if self.run.device != "auto":
            return self
        run = replace(self.run, device=automatic_device())
        return replace(self, run=run, device_is_automatic=True)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return self.run.output or default_output(self.run.data, self.run.seed)

    def load_data(self) -> Data:
        """The data set that the options name."""
        return self.data.load(self.run.root, self.run.seed)

    def config(self) -> dict[str, Any]:
        """The options that decide the result, in plain types; `parsing.parse_config` reads them."""
        run = dataclasses.asdict(self.run)
        tables = {name: run.pop(name) for name in ("model", "optimizer", "loss", "loader")}
        for name in NOT_IN_FILES:
            del run[name]
        return _plain({**run, **dataclasses.asdict(self.data), **tables})  # type: ignore[call-overload]


def default_output(data: str, seed: int | str) -> Path:
    """The folder of a run without --output."""
    return Path("runs") / f"{data}-{seed}"


@dataclass(frozen=True)
class ExtractorOptions:
    """The networks of frames."""

    extractor: str = "auto"
    """torchvision's network, of images or, with --frames, of video; auto is resnet18."""
    weights: str = "auto"
    """imagenet, kinetics400 or pretrained (torchvision's default), downloaded once; the path of a
    file with torchvision's names; or none, random weights. auto is imagenet for networks of images,
    kinetics400 for those of video."""


@dataclass(frozen=True)
class ExtractOptions:
    """The options of the extraction of features without a checkpoint."""

    data: str
    """Data set of frames; it brings options of its own."""
    output: Path | None = None
    """Folder to write the arrays to, new or empty; when None, features/DATA."""
    root: Path | None = None
    """Folder of the data set's files."""
    seed: int = 0
    """Seed of the data set's split and of random weights."""
    device: str = "auto"
    """Device of the networks, as PyTorch names it; auto as in train."""
    model: ExtractorOptions = field(default_factory=ExtractorOptions)
    loader: LoaderOptions = field(default_factory=LoaderOptions)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, Path):
        return str(value)  # TOML has no null: "None" is what the command line takes too
    return value


def _check(valid: bool, option: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"{option.replace('_', '-')} must be {expected}, but is {value}")
