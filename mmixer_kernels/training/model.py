"""The trained network: an extractor a modality, and a mixer on their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data import Data
from ..network import MMixer
from .command import UserError
from .options import ModelOptions, RunOptions


class Recognizer(nn.Module):
    """Feature extractors (Eq. 1) under an M-Mixer.

    Args:
        extractors: a module a modality, `[B, T, ...] -> [B, T', feature_sizes[i]]`.
        mixer: an `MMixer` with batch_first.
        feature_dropout: the part of the features that is dropped in training.
        dropout: the part of the joint state [h_T^1 || ... || h_T^N] that is dropped in training.
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

    def forward(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, K]` of N tensors `[B, T, ...]` (Eq. 5); `lengths` as in `MMixer`."""
        joint = torch.cat(self.streams(inputs, lengths), dim=-1)
        return self.mixer.classifier(self.dropout(joint))

    def streams(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """Each modality's h_T: N tensors `[B, H]`."""
        features = [
            self.feature_dropout(extractor(x))
            for extractor, x in zip(self.extractors, inputs, strict=True)
        ]
        return self.mixer.streams(features, lengths)


def build(options: ModelOptions, data: Data) -> Recognizer:
    """The network that the options describe, for the modalities and classes of a data set."""
    mixer = MMixer(
        data.feature_sizes,
        len(data.classes),
        hidden_size=options.hidden_size,
        unit=options.unit,
        summarizer=options.summarizer,
        content=options.content,
        mix=options.mix,
        layer_norm=options.layer_norm,
        engine=options.engine,
    )
    return Recognizer(data.extractors, mixer, options.feature_dropout, options.dropout)


def place(recognizer: Recognizer, run: RunOptions, device: torch.device) -> Recognizer:
    """The network on its device, in the form that the options ask for; its state_dict's keys are
    the same in every form.

    Raises:
        UserError: synchronized batch norm on a device where PyTorch has none.
    """
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
        recognizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.compile:
        recognizer.compile()  # in place: torch.compile(recognizer) would rename the state_dict
    return recognizer
