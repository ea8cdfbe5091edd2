from __future__ import annotations

import pytest
import torch
import torchvision
from torch.func import functional_call

from mmixer_kernels.data.transforms import normalized
from mmixer_kernels.training import extractors, pretrained
from mmixer_kernels.training.extractors import ClipNetwork, FrameNetwork

IMAGES, VIDEOS = extractors.names()
FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "vgg11", "vit_b_32"),
)
"""A network of each module of torchvision.models."""
STEPS = {
    **{"r3d_18": 2, "r2plus1d_18": 2, "s3d": 2, "mc3_18": 16, "mvit_v1_b": 8, "mvit_v2_s": 8},
    **{"swin3d_t": 8, "swin3d_s": 8, "swin3d_b": 8},
}
"""T' of 16 frames."""


def features_of_shape(name: str, steps: int, size: int = 224) -> tuple[int, ...]:
    """The shape of the features of frames `[2, steps, 3, size, size]`, and what goes before the
    classifier according to the network."""
    extractor = extractors.build(name).eval()
    tensors = {**dict(extractor.named_parameters()), **dict(extractor.named_buffers())}
    shapes = {key: value.detach().to("meta") for key, value in tensors.items()}
    frames = torch.empty(2, steps, 3, size, size, device="meta")
    with torch.no_grad():
        features = functional_call(extractor, shapes, (frames,))
    assert features.shape[-1] == extractor.feature_size
    assert isinstance(extractor.network.get_submodule(extractor.classifier), torch.nn.Identity)
    return tuple(features.shape[:2])


def test_there_is_a_network_of_each_family() -> None:
    modules = {torchvision.models.get_model_builder(name).__module__ for name in IMAGES}
    assert {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES} == modules
    assert set(STEPS) == set(VIDEOS)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_network_gives_features_of_each_frame(name: str) -> None:
    assert features_of_shape(name, 3) == (2, 3)


@pytest.mark.parametrize("name", ["mc3_18", "mvit_v2_s", "r3d_18", "s3d", "swin3d_t"])
def test_a_video_network_keeps_the_time(name: str) -> None:
    assert features_of_shape(name, 16) == (2, STEPS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_every_network_gives_features(name: str) -> None:
    if name == "regnet_y_128gf":
        pytest.skip("2.6 GB of weights")
    steps = 16 if name in VIDEOS else 2
    size = 518 if name == "vit_h_14" else 224
    assert features_of_shape(name, steps, size) == (2, STEPS.get(name, steps))


@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "mobilenet_v3_small", "swin_t", "r3d_18", "swin3d_t"]
)
def test_the_features_are_what_torchvisions_classifier_gets(name: str) -> None:
    torch.manual_seed(0)
    ours = extractors.build(name).eval()
    arguments = {"init_weights": True, "transform_input": True} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, **arguments).eval()
    theirs.load_state_dict(ours.network.state_dict(), strict=False)
    kept: list[torch.Tensor] = []
    classifier = theirs.get_submodule(ours.classifier)
    classifier.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    frames = torch.randn(2, 8, 3, 32, 32)
    with torch.no_grad():
        features = ours(frames)
        if name in VIDEOS:
            features = features.mean(1)
            theirs(ours.normalized(frames).transpose(1, 2))
        else:
            features = features.flatten(0, 1)
            theirs(frames.flatten(0, 1))
    # Random weights of many layers leave features that hardly depend on the frames.
    changes = kept[0] - kept[0].mean(0)
    assert (features - kept[0]).norm() < 1e-3 * changes.norm()


def test_s3ds_and_mvits_features_are_means_of_their_maps() -> None:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    clips = torch.randn(2, 3, 8, 32, 32)
    kept: list[torch.Tensor] = []
    s3d = torchvision.models.get_model("s3d").eval()
    s3d.features.register_forward_hook(lambda module, inputs, output: kept.append(output))
    blocks = [
        MSBlockConfig(1, 8, 16, [3] * 3, [3] * 3, [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(2, 16, 16, [3] * 3, [3] * 3, [1, 1, 1], [1, 1, 1]),
    ]
    mvit = MViT((32, 32), 8, blocks, False, False, False, False).eval()
    mvit.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        ours = extractors._FEATURES["S3D"](s3d, clips)
        assert torch.equal(ours, kept[-1].mean((3, 4)).transpose(1, 2))
        mvit(clips)
        tokens = kept[-1]
        ours = extractors._FEATURES["MViT"](mvit, clips)
        assert torch.equal(kept[-1], tokens)  # the way to the tokens is torchvision's
        for step in range(4):  # of 4 x 4 patches each, after the class's token
            patches = tokens[:, 1 + 16 * step : 17 + 16 * step]
            torch.testing.assert_close(ours[:, step], patches.mean(1))


@pytest.mark.parametrize("name", ["r3d_18", "mvit_v1_b", "swin3d_t", "resnet18"])
def test_frames_get_the_mean_and_deviation_of_the_networks_weights(name: str) -> None:
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    extractor = extractors.build(name)
    preset = extractors.default_weights(name).transforms()
    mean, std = (torch.tensor(x)[:, None, None] for x in (preset.mean, preset.std))
    inputs = normalized(pixels)
    torch.testing.assert_close(extractor.normalized(inputs), (pixels / 255 - mean) / std)
    assert (extractor.normalized(inputs) is inputs) == (name in ("swin3d_t", "resnet18"))
    assert all(key.startswith("network.") for key in extractor.state_dict())


def test_all_weights_of_a_network_that_have_a_name_want_the_same_inputs() -> None:
    for name in (*IMAGES, *VIDEOS):
        default = extractors.default_weights(name)
        for entry in type(default):
            if entry.name in pretrained.ENTRIES.values():
                ours, theirs = default.transforms(), entry.transforms()
                assert (ours.mean, ours.std) == (theirs.mean, theirs.std), name


def test_resnets_keep_the_names_of_checkpoints() -> None:
    theirs = torchvision.models.resnet18().state_dict()
    ours = extractors.build("resnet18")
    assert isinstance(ours, FrameNetwork)
    assert list(ours.state_dict()) == [
        f"network.{key}" for key in theirs if not key.startswith("fc.")
    ]


def test_an_unknown_name_is_told_with_the_ones_that_are_close() -> None:
    with pytest.raises(ValueError, match=r"--model\.extractor must .* resnet_18: perhaps resnet18"):
        extractors.build("resnet_18")
    with pytest.raises(ValueError, match=r"is swin3d: perhaps .*swin3d_t"):
        extractors.build("swin3d")
    with pytest.raises(ValueError, match=r"is dinov2: of video they are mc3_18, mvit"):
        extractors.build("dinov2")


def test_a_shape_that_a_network_cannot_take_is_told() -> None:
    extractor = extractors.build("mvit_v2_s").train()
    before = [(parameter.device, parameter.data_ptr()) for parameter in extractor.parameters()]
    extractors.check(extractor, (16, 3, 224, 224))
    for shape in ((8, 3, 224, 224), (16, 3, 112, 112)):
        with pytest.raises(
            ValueError,
            match=rf"mvit_v2_s cannot take clips of {shape[0]} frames of {shape[2]} x {shape[3]} "
            r"pixels .*--frames and --image-size.* 16 frames of 224 pixels",
        ):
            extractors.check(extractor, shape)
    assert isinstance(extractor, ClipNetwork)
    assert extractor.training
    assert before == [
        (parameter.device, parameter.data_ptr()) for parameter in extractor.parameters()
    ]
