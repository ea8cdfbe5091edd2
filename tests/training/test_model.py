from __future__ import annotations

import torch
from torch import nn

from mmixer_kernels import MMixer
from mmixer_kernels.training.model import Recognizer


def test_without_dropout_it_is_the_mixer_on_the_features() -> None:
    mixer = MMixer([3, 5], 4, hidden_size=6, engine="reference")
    extractors = [nn.Linear(2, 3), nn.Identity()]
    recognizer = Recognizer(extractors, mixer)
    inputs = [torch.randn(2, 7, 2), torch.randn(2, 7, 5)]
    lengths = torch.tensor([7, 4])
    features = [extractor(x) for extractor, x in zip(extractors, inputs, strict=True)]
    assert torch.equal(recognizer(inputs, lengths), mixer(features, lengths))
    for ours, theirs in zip(
        recognizer.streams(inputs, lengths), mixer.streams(features, lengths), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_each_dropout_works_in_training_only() -> None:
    inputs = [torch.randn(2, 7, 5), torch.randn(2, 7, 5)]
    for where in ("feature_dropout", "dropout"):
        mixer = MMixer([5, 5], 4, hidden_size=6, engine="reference")
        recognizer = Recognizer([nn.Identity(), nn.Identity()], mixer, **{where: 0.5})
        assert not torch.equal(recognizer(inputs), recognizer(inputs))
        same_streams = torch.equal(recognizer.streams(inputs)[0], recognizer.streams(inputs)[0])
        assert same_streams == (where == "dropout")
        recognizer.eval()
        assert torch.equal(recognizer(inputs), mixer(inputs))
