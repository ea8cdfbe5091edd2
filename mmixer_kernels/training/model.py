"""The network that is trained: an extractor per modality, and a mixer on their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import UserError
from ..network import MMixer
from . import extractors, gradient_checkpointing, pretrained
from .options import ModelOptions, RunOptions


class Recognizer(nn.Module):
    """Feature extractors (Eq. 1) under an M-Mixer.

    Where samples have `lengths`, extractors see the valid steps only, as one sequence
    `[1, sum(lengths), ...]`: padding costs nothing and does not enter batch norm's statistics.
    So they must then treat each step by itself, as networks of single frames do.

    `frozen` says that the extractors stay as they are, as `freeze` makes it.

    Args:
        extractors: a module per modality, `[B, T, ...] -> [B, T', feature_sizes[i]]`.
        mixer: an `MMixer` with batch_first.
        feature_dropout: the fraction of the features that is dropped in training.
        dropout: the fraction of the joint state [h_T^1 || ... || h_T^N] that is dropped in
            training.
    """

    def __init__(
        self,
        extractors: Sequence[nn.Module],
        mixer: MMixer,
        feature_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.extractors = nn.ModuleList(extractors)
        self.mixer = mixer
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.dropout = nn.Dropout(dropout)
        self.frozen = False

    def freeze(self) -> None:
        """Keeps the extractors as they are from now on: without gradients, and in evaluation mode
        also in training, so that batch norm's statistics stay and nothing is dropped."""
        self.frozen = True
        self.extractors.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Recognizer:
        """Sets the mode of all but frozen extractors."""
        super().train(mode)
        if self.frozen:
            self.extractors.eval()
        return self

    def forward(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, K]` of N tensors `[B, T, ...]` (Eq. 5); `lengths` as in `MMixer`."""
        return self.classify(self.streams(inputs, lengths))

    def classify(self, streams: Sequence[Tensor]) -> Tensor:
        """Logits `[B, K]` of each modality's h_T, as `streams` gives them (Eq. 5)."""
        return self.mixer.classifier(self.dropout(torch.cat(list(streams), dim=-1)))

    def streams(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """Each modality's h_T: N tensors `[B, H]`."""
        features = [self.feature_dropout(x) for x in self.features(inputs, lengths)]
        return self.mixer.streams(features, lengths)

    def features(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """The extractors' features of N tensors `[B, T, ...]`: N tensors
        `[B, T', feature_sizes[i]]`, zeros past a sample's length."""
        pairs = zip(self.extractors, inputs, strict=True)
        if lengths is None:
            return [extractor(x) for extractor, x in pairs]
        steps = torch.arange(inputs[0].shape[1], device=lengths.device)
        valid = steps < lengths[:, None]
        return [_of_valid_steps(extractor, x, valid) for extractor, x in pairs]


def build(options: ModelOptions, data: Data, initial: bool = True) -> Recognizer:
    """The network that the options describe, for the modalities and classes of a data set.

    Args:
        options: the network's.
        data: the data set.
        initial: False where a checkpoint's weights will replace the initial ones: pretrained
            weights are then not read.

    Raises:
        ValueError: an option that does not go with the data set, or pretrained weights that do
            not fit.
        OSError: weights that cannot be had.
        ModuleNotFoundError: torchvision is not installed.
    """
    modules, sizes = _extractors(options, data, initial)
    mixer = MMixer(
        sizes,
        len(data.classes),
        hidden_size=options.hidden_size,
        unit=options.unit,
        summarizer=options.summarizer,
        content=options.content,
        mix=options.mix,
        layer_norm=options.layer_norm,
        init=options.init,
        engine=options.engine,
    )
    return Recognizer(modules, mixer, options.feature_dropout, options.dropout)


def check_sample(recognizer: Recognizer, data: Data) -> None:
    """Tries extractors of frames on the shape of the first training sample, for some networks take
    clips of one length or size only.

    Raises:
        ValueError: they cannot take it, or the sample cannot be read.
    """
    first = recognizer.extractors[0]
    if isinstance(first, extractors.Extractor):
        extractors.check(first, data.train[0].inputs[0].shape)


def place(recognizer: Recognizer, run: RunOptions, device: torch.device) -> Recognizer:
    """The network on its device, in the form that the options ask for; its state_dict's keys are
    the same in every form.

    Raises:
        UserError: synchronized batch norm on a device where PyTorch has none, or an option of the
            extractors where they have no weights.
    """
    _check_trainable(recognizer, run)
    if run.optimizer.extractor_rate == 0:
        recognizer.freeze()
    elif run.model.gradient_checkpointing:
        for extractor in recognizer.extractors:
            gradient_checkpointing.install(extractor)
    if run.model.sync_batch_norm:
        if device.type != "cuda":
            raise UserError(
                f"--model.sync-batch-norm works on GPUs only, but --device is {device}: leave it "
                "out, and each process normalises with its own samples"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(recognizer)
    recognizer.to(device)
    if run.channels_last:
        # A convolution whose weight is channels last takes and gives its pictures so; only the
        # 4-D parameters change.
        cast(Any, recognizer).to(memory_format=torch.channels_last)  # not in all versions' types
    if run.compile:
        recognizer.compile()  # in place: torch.compile(recognizer) would rename the state_dict
    return recognizer


def _extractors(
    options: ModelOptions, data: Data, initial: bool
) -> tuple[Sequence[nn.Module], Sequence[int]]:
    """The data set's own extractors and their sizes, or for frames a network per modality."""
    if data.extractors is not None and data.feature_sizes is not None:
        for name in ("extractor", "weights"):
            value = getattr(options, name)
            if value != "auto":
                raise ValueError(
                    f"--model.{name} must be left out for a data set that is not of frames, "
                    f"but is {value}"
                )
        return data.extractors, data.feature_sizes
    name = extractors.AUTO if options.extractor == "auto" else options.extractor
    networks = [extractors.build(name) for _ in data.modalities]
    if networks[0].joins_steps and data.steps is None:
        raise ValueError(
            f"--model.extractor {name} joins the frames of a clip, so all clips must have the same "
            "number of them: give it by --frames, such as --frames 16"
        )
    if initial:
        pretrained.load(networks, options.weights)
    return networks, [network.feature_size for network in networks]


def _check_trainable(recognizer: Recognizer, run: RunOptions) -> None:
    """Raises UserError where options speak of extractors' weights and there are none."""
    if next(recognizer.extractors.parameters(), None) is not None:
        return
    for option, given in (
        ("--optimizer.extractor-rate", run.optimizer.extractor_rate is not None),
        ("--model.gradient-checkpointing", run.model.gradient_checkpointing),
    ):
        if given:
            raise UserError(
                f"{option} must be left out for {run.data}, whose samples are features already: "
                "there are no extractors to train"
            )


def _of_valid_steps(extractor: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    features = extractor(x[valid].unsqueeze(0)).squeeze(0)
    padded = features.new_zeros(*valid.shape, features.shape[-1])
    padded[valid] = features
    return padded
