from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmixer_kernels import MMixer
from mmixer_kernels.data import Data, Sample, Split, SyntheticOptions
from mmixer_kernels.errors import UserError
from mmixer_kernels.training import extractors, model, parsing, pretrained
from mmixer_kernels.training.model import Recognizer, build
from mmixer_kernels.training.options import ModelOptions


def frame_data(modalities: tuple[str, ...] = ("rgb", "depth")) -> Data:
    split = Split(torch.zeros(1, dtype=torch.int64))
    return Data(modalities, ("a", "b", "c"), split, split, split, None, None)


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


def test_padding_does_not_reach_batch_norm() -> None:
    """Padding changes nothing: samples side by side are what they are one after the other."""
    recognizer = build(ModelOptions(hidden_size=8, weights="none"), frame_data()).double()
    lengths = [3, 1, 2]
    clips = [[torch.randn(n, 3, 32, 32).double() + 1 for n in lengths] for _ in range(2)]
    padded = [nn.utils.rnn.pad_sequence(part, batch_first=True) for part in clips]
    valid = [torch.cat(part).unsqueeze(0) for part in clips]
    before = {name: value.clone() for name, value in recognizer.state_dict().items()}
    recognizer.train()
    features = recognizer.features(padded, torch.tensor(lengths))
    after = {name: value.clone() for name, value in recognizer.state_dict().items()}
    recognizer.load_state_dict(before)
    for i, expected in enumerate(recognizer.features(valid)):
        assert torch.equal(
            torch.cat([x[:n] for x, n in zip(features[i], lengths, strict=True)]), expected[0]
        )
        assert all((x[n:] == 0).all() for x, n in zip(features[i], lengths, strict=True))
    for name, value in recognizer.state_dict().items():
        assert torch.equal(after[name], value), name
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any(name.endswith("running_var") for name in changed)

    recognizer.eval()
    logits = recognizer(padded, torch.tensor(lengths))
    alone = [recognizer([part[i].unsqueeze(0) for part in clips]) for i in range(len(lengths))]
    torch.testing.assert_close(logits, torch.cat(alone))


def test_frames_get_a_network_a_modality_with_the_chosen_weights(tmp_path: Path) -> None:
    import torchvision

    state = torchvision.models.resnet34().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    options = ModelOptions(8, extractor="resnet34", weights=str(tmp_path / "weights.pth"))
    recognizer = build(options, frame_data(("rgb", "depth", "ir")))
    assert recognizer.mixer.feature_sizes == [512] * 3
    assert len({id(extractor) for extractor in recognizer.extractors}) == 3
    for extractor in recognizer.extractors:
        assert isinstance(extractor, extractors.FrameNetwork)
        assert torch.equal(extractor.network.state_dict()["conv1.weight"], state["conv1.weight"])


def test_a_checkpoints_network_needs_no_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(networks: list[nn.Module], weights: str) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(pretrained, "load", refuse)
    build(ModelOptions(8), frame_data(), initial=False)
    with pytest.raises(AssertionError, match="asked for"):
        build(ModelOptions(8), frame_data())


def test_a_video_network_needs_clips_of_one_length() -> None:
    options = ModelOptions(8, extractor="r3d_18", weights="none")
    with pytest.raises(ValueError, match=r"r3d_18 joins the frames .*such as --frames 16"):
        build(options, frame_data())
    recognizer = build(options, replace(frame_data(), steps=16))
    assert recognizer.mixer.feature_sizes == [512] * 2
    features = recognizer.eval().features([torch.randn(1, 16, 3, 16, 16)] * 2)
    assert [tuple(x.shape) for x in features] == [(1, 2, 512)] * 2


def test_a_sample_that_the_network_cannot_take_is_told_before_training() -> None:
    class Frames(Split):
        def __getitem__(self, index: int) -> Sample:
            return Sample((torch.zeros(4, 3, 16, 16),) * 2, 0, 4)

    data = replace(frame_data(), train=Frames(torch.zeros(1, dtype=torch.int64)), steps=4)
    for extractor in ("s3d", "mvit_v2_s"):
        recognizer = build(ModelOptions(8, extractor=extractor, weights="none"), data)
        with pytest.raises(ValueError, match=rf"{extractor} cannot take clips of 4 frames of 16 x"):
            model.check_sample(recognizer, data)
    model.check_sample(build(ModelOptions(8, extractor="r3d_18", weights="none"), data), data)


def test_the_options_are_the_mixers() -> None:
    data = SyntheticOptions(frame_size=8, frames=2).load(None, 0)
    options = ModelOptions(
        8, content="none", layer_norm=False, init="orthogonal", engine="reference"
    )
    for unit in build(options, data).mixer.units:
        assert (unit.hidden_size, unit.context_size) == (8, 0)
        assert (unit.layer_norm, unit.init, unit.engine) == (False, "orthogonal", "reference")


@pytest.mark.parametrize("option", [{"extractor": "resnet18"}, {"weights": "imagenet"}])
def test_data_with_extractors_of_its_own_takes_no_other(option: dict[str, str]) -> None:
    data = SyntheticOptions(frame_size=8, frames=2).load(None, 0)
    (name,) = option
    with pytest.raises(
        ValueError, match=rf"--model\.{name} must be left out .* but is {option[name]}"
    ):
        build(ModelOptions(8, **option), data)  # type: ignore[arg-type]


def small(*arguments: str) -> Recognizer:
    sizes = ("--frames", "2", "--frame-size", "8", "--samples", "16", "--model.hidden-size", "8")
    given = parsing.parse([*sizes, "--model.engine", "reference", *arguments], "train")
    torch.manual_seed(0)
    recognizer = model.build(given.run.model, given.load_data())
    return model.place(recognizer, given.run, torch.device("cpu"))


@pytest.mark.parametrize(
    "form", [pytest.param("--compile", marks=pytest.mark.slow), "--channels-last"]
)
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


def test_frozen_extractors_stay_and_keep_nothing_for_backward() -> None:
    options = ModelOptions(hidden_size=8, weights="none", engine="reference")
    recognizer = build(options, frame_data())
    recognizer.freeze()
    assert recognizer.train() is recognizer
    assert recognizer.mixer.training
    assert not any(module.training for module in recognizer.extractors.modules())
    before = {name: value.clone() for name, value in recognizer.state_dict().items()}
    inputs = [torch.randn(2, 3, 3, 32, 32) for _ in range(2)]
    features = recognizer.features(inputs)
    assert all(x.grad_fn is None and not x.requires_grad for x in features)
    recognizer(inputs).sum().backward()
    assert all(weight.grad is None for weight in recognizer.extractors.parameters())
    assert all(weight.grad is not None for weight in recognizer.mixer.parameters())
    for name, value in recognizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_run_s_options_freeze_and_recompute() -> None:
    assert not small().frozen
    assert not small("--optimizer.extractor-rate", "1e-5").frozen
    frozen = small("--optimizer.extractor-rate", "0", "--model.gradient-checkpointing")
    assert frozen.frozen
    assert not any(weight.requires_grad for weight in frozen.extractors.parameters())
    formed, plain = small("--model.gradient-checkpointing"), small()
    sizes = []
    for recognizer in (formed, plain):
        kept: list[int] = []

        def keep(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            recognizer.features([torch.randn(3, 2, 3, 8, 8), torch.randn(3, 2, 1, 8, 8)])
        sizes.append(sum(kept))
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    "option", [("--optimizer.extractor-rate", "0"), ("--model.gradient-checkpointing",)]
)
def test_options_of_extractors_need_extractors_with_weights(option: tuple[str, ...]) -> None:
    given = parsing.parse(["--data", "arrays", "--device", "cpu", *option], "train")
    mixer = MMixer([5, 5], 4, hidden_size=6)
    recognizer = Recognizer([nn.Identity(), nn.Identity()], mixer)
    with pytest.raises(UserError, match=rf"{option[0]} must be left out for arrays"):
        model.place(recognizer, given.run, torch.device("cpu"))


def test_synchronized_batch_norm_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"--model.sync-batch-norm works on GPUs only, .* is cpu"):
        small("--model.sync-batch-norm")
