from __future__ import annotations

import pytest
import torch
from torch import nn

from mmixer_kernels import MMixer
from mmixer_kernels.training import model, options
from mmixer_kernels.training.command import UserError
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


def small(*arguments: str) -> Recognizer:
    sizes = ("--frames", "2", "--frame-size", "8", "--samples", "16", "--model.hidden-size", "8")
    given = options.parse([*sizes, "--model.engine", "reference", *arguments], "train")
    torch.manual_seed(0)
    recognizer = model.build(given.run.model, given.load_data())
    return model.place(recognizer, given.run, torch.device("cpu"))


@pytest.mark.parametrize("form", ["--compile", "--channels-last"])
def test_forms_compute_the_same_under_the_same_keys(form: str) -> None:
    torch._dynamo.utils.counters.clear()
    plain, formed = small(), small(form)
    assert list(formed.state_dict()) == list(plain.state_dict())
    inputs = [torch.randn(3, 2, 3, 8, 8), torch.randn(3, 2, 1, 8, 8)]
    ours, theirs = formed(inputs), plain(inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    for our, their in zip(formed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-5)
    captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert (captured > 0) == (form == "--compile")


def test_channels_last_reaches_the_convolutions_outputs() -> None:
    layouts = []
    for arguments in ((), ("--channels-last",)):
        formed = small(*arguments)
        convolution = formed.extractors[0].layers[2]
        convolution.register_forward_hook(
            lambda module, inputs, output: layouts.append(
                output.is_contiguous(memory_format=torch.channels_last)
            )
        )
        formed([torch.randn(3, 2, 3, 8, 8), torch.randn(3, 2, 1, 8, 8)])
    assert layouts == [False, True]


def test_synchronized_batch_norm_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"--model.sync-batch-norm works on GPUs only, .* is cpu"):
        small("--model.sync-batch-norm")
