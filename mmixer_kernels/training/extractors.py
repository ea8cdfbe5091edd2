"""Feature extractors of frames (Eq. 1): torchvision's networks without their classifiers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.transforms import MEAN, STD

AUTO = "resnet18"
"""The network that `auto` stands for, the paper's."""


class Extractor(nn.Module):
    """A torchvision network without its classifier, random until it gets a state dict.

    It takes frames as data/transforms.py leaves them, and brings them to the mean and standard
    deviation that torchvision's weights of the network were trained with.

    Args:
        name: torchvision's name of the network.

    Attributes:
        network: torchvision's module; its state dict is torchvision's but for the classifier.
        classifier: the name of the classifier in `network`, where an identity is now.
        feature_size: the features of a step.
    """

    scale: Tensor | None
    shift: Tensor | None
    joins_steps: ClassVar[bool]
    """True where a feature is of several frames, so that all clips need the same number of them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        models = torchvision().models
        self.name = name
        self.network = models.get_model(name, **_arguments(name))
        self.classifier, self.feature_size = _take_classifier(self.network)
        preset = default_weights(name).transforms()
        same = (tuple(preset.mean), tuple(preset.std)) == (MEAN, STD)
        scale, shift = (None, None) if same else _renormalization(preset.mean, preset.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def normalized(self, frames: Tensor) -> Tensor:
        """Frames `[..., 3, H, W]` with the mean and standard deviation of the network's weights."""
        if self.scale is None or self.shift is None:
            return frames
        return frames * self.scale + self.shift


class FrameNetwork(Extractor):
    """An image network on each frame by itself: `[B, T, 3, H, W] -> [B, T, feature_size]`."""

    joins_steps = False

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, T, feature_size]` of frames `[B, T, 3, H, W]`."""
        pictures = self.normalized(frames).flatten(0, 1)
        return self.network(pictures).unflatten(0, frames.shape[:2])


class ClipNetwork(Extractor):
    """A video network on clips, whose last feature map is averaged over height and width alone:
    `[B, T, 3, H, W] -> [B, T', feature_size]`.

    T' is T where the network has no stride along time (mc3_18), T / 2 for swin3d and mvit, and
    T / 8 for r3d_18, r2plus1d_18 and s3d. mvit takes 16 frames of 224 x 224 pixels only.
    """

    joins_steps = True

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, T', feature_size]` of frames `[B, T, 3, H, W]`."""
        clips = self.normalized(frames).transpose(1, 2)
        return _FEATURES[type(self.network).__name__](self.network, clips)


def build(name: str) -> FrameNetwork | ClipNetwork:
    """The extractor with torchvision's network of that name.

    Raises:
        ValueError: torchvision has no such network of images or video.
        ModuleNotFoundError: torchvision is not installed.
    """
    images, videos = names()
    if name not in (*images, *videos):
        close = difflib.get_close_matches(name, (*images, *videos))
        hint = (
            f"perhaps {' or '.join(close)}" if close else f"of video they are {', '.join(videos)}"
        )
        raise ValueError(
            "--model.extractor must be auto or the name of a network of images or of video in "
            f"torchvision.models, but is {name}: {hint}"
        )
    return ClipNetwork(name) if name in videos else FrameNetwork(name)


def check(extractor: Extractor, shape: Sequence[int]) -> None:
    """Tries a network on a sample's shape, `[T, 3, H, W]`, without computing anything.

    Raises:
        ValueError: the network cannot take it.
    """
    tensors = {**dict(extractor.named_parameters()), **dict(extractor.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    sample = torch.empty(1, *shape, device="meta")
    training = extractor.training
    try:
        with torch.no_grad():
            functional_call(extractor.eval(), shapes, (sample,))
    except (RuntimeError, ValueError, AssertionError) as error:
        steps, _, height, width = shape
        weights = default_weights(extractor.name)
        frames = weights.meta.get("min_temporal_size")
        size = f"{weights.transforms().crop_size[0]} pixels"
        raise ValueError(
            f"--model.extractor {extractor.name} cannot take clips of {steps} frames of {height} x "
            f"{width} pixels ({str(error).splitlines()[0].rstrip('.')}): choose others by "
            f"--frames and --image-size; torchvision's own are "
            f"{f'{frames} frames of {size}' if frames else size}"
        ) from error
    finally:
        extractor.train(training)


def names() -> tuple[list[str], list[str]]:
    """The names of torchvision's networks of images, and of those of video."""
    models = torchvision().models
    return models.list_models(module=models), models.list_models(module=models.video)


def default_weights(name: str) -> Any:
    """The entry of the weights that torchvision names the default of a network."""
    return torchvision().models.get_model_weights(name).DEFAULT


def torchvision() -> Any:
    """The module; ModuleNotFoundError, with what to install, where it is not there."""
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the extractors of frames are torchvision's, which is not installed: "
            "pip install 'mmixer_kernels[video]'"
        ) from error
    return torchvision


def _arguments(name: str) -> dict[str, Any]:
    """The arguments with which torchvision builds a network for its weights, without the
    classifiers that help in training only."""
    if name in ("googlenet", "inception_v3"):
        # Their weights are of inputs normalised otherwise than their presets say.
        return {"aux_logits": False, "transform_input": True, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": default_weights(name).meta["min_size"][0]}
    return {}


def _take_classifier(network: nn.Module) -> tuple[str, int]:
    """Puts an identity in the classifier's place; gives its name and the size of its inputs."""
    for kind in (nn.Linear, nn.Conv3d, nn.Conv2d):  # s3d's is a Conv3d, squeezenet's a Conv2d
        found = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if found:
            break
    name = found[-1]
    layer: Any = network.get_submodule(name)
    network.set_submodule(name, nn.Identity())
    return name, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _renormalization(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The factor and the summand `[3, 1, 1]` from data/transforms.py's normalisation to one with
    this mean and standard deviation."""
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (MEAN, STD, mean, std)
    )
    return (old_std / new_std).float(), ((old_mean - new_mean) / new_std).float()


def _resnet_features(network: Any, clips: Tensor) -> Tensor:
    maps = network.stem(clips)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps = stage(maps)
    return maps.mean((3, 4)).transpose(1, 2)


def _s3d_features(network: Any, clips: Tensor) -> Tensor:
    return network.features(clips).mean((3, 4)).transpose(1, 2)


def _swin_features(network: Any, clips: Tensor) -> Tensor:
    maps = network.features(network.pos_drop(network.patch_embed(clips)))
    return network.norm(maps).mean((2, 3))


def _mvit_features(network: Any, clips: Tensor) -> Tensor:
    encoding = network.pos_encoding
    tokens = encoding(network.conv_proj(clips).flatten(2).transpose(1, 2))
    size = (encoding.temporal_size, *encoding.spatial_size)
    for block in network.blocks:
        tokens, size = block(tokens, size)
    patches = network.norm(tokens)[:, 1:]  # the first token is the class's
    return patches.unflatten(1, size).mean((2, 3))


_FEATURES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "VideoResNet": _resnet_features,
    "S3D": _s3d_features,
    "SwinTransformer3d": _swin_features,
    "MViT": _mvit_features,
}
"""The features `[B, T', D]` of clips `[B, 3, T, H, W]` by torchvision's classes of networks."""
