"""Feature extractors of frames (Eq. 1): torchvision's ResNets, as in the paper."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FEATURE_SIZE = 512
"""The size d_f of both networks' features."""
FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth"}
"""The files of torchvision's ImageNet weights."""


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier, on each frame by itself:
    `[B, T, 3, H, W] -> [B, T, 512]`.

    Args:
        name: "resnet18" or "resnet34".
        state: torchvision's state dict of the network; None for random weights.
    """

    def __init__(self, name: str, state: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        network = _torchvision().models.get_model(name)
        network.fc = nn.Identity()
        if state is not None:
            network.load_state_dict(state)
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, T, 512]` of frames `[B, T, 3, H, W]`."""
        return self.network(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def pretrained(name: str, weights: str) -> dict[str, Tensor] | None:
    """The state dict that a `ResNet` starts from.

    Args:
        name: "resnet18" or "resnet34".
        weights: "imagenet", torchvision's, downloaded once; "none"; or the path of a state dict
            with torchvision's names, of which the classifier, `fc.*`, is left out.

    Returns:
        The state dict, None for "none".

    Raises:
        OSError: the download fails, or the file cannot be read.
        ValueError: the file holds something else; the message names file and keys.
        ModuleNotFoundError: torchvision is not installed.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        source, state = FILES[name], _downloaded(name)
    else:
        source, state = weights, _read(Path(weights))
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    _check(name, state, source)
    return state


def _downloaded(name: str) -> dict[str, Tensor]:
    weights = _torchvision().models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"the ImageNet weights {FILES[name]} are not in {folder} and cannot be downloaded "
            f"({error}): bring that file here and give it by --model.weights PATH, or begin with "
            "random weights by --model.weights none"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--model.weights must be imagenet, none or a file, but {path} is not a file"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(
            f"{path} must be a state dict as torch.save writes it, but cannot be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} must be a state dict, tensors by name, but is not")
    return state


def _check(name: str, state: dict[str, Tensor], source: str) -> None:
    with torch.device("meta"):
        expected = ResNet(name).network.state_dict()
    # Files from before torch 0.4.1 have no num_batches_tracked, and PyTorch reads them.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in state if key not in expected]
    wrong = [
        f"{key} is {list(state[key].shape)}, must be {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{kind} {_few(keys)}"
        for kind, keys in (
            ("lacks", missing),
            ("has unknown", unknown),
            ("has wrong sizes:", wrong),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{source} must hold the weights of torchvision's {name}, but {'; '.join(problems)}: "
            "choose the network by --model.extractor"
        )


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _torchvision() -> Any:
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the extractors of frames are torchvision's, which is not installed: "
            "pip install 'mmixer_kernels[video]'"
        ) from error
    return torchvision
