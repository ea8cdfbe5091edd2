from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from mmixer_kernels.training import extractors
from mmixer_kernels.training.extractors import ResNet, pretrained


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_a_local_file_gives_torchvisions_features(name: str, tmp_path: Path) -> None:
    theirs = torchvision.models.get_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = ResNet(name, pretrained(name, str(tmp_path / "weights.pth"))).eval()
    frames = torch.randn(2, 3, 3, 32, 32)
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        features = ours(frames)
        assert features.shape == (2, 3, extractors.FEATURE_SIZE)
        assert torch.equal(features.flatten(0, 1), theirs(frames.flatten(0, 1)))


def test_a_file_without_batch_norm_counters_and_classifier_fits(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    old = {
        key: value
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "old.pth")
    network = ResNet("resnet18", pretrained("resnet18", str(tmp_path / "old.pth"))).network
    assert all(torch.equal(network.state_dict()[key], value) for key, value in old.items())


def test_wrong_files_are_named_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refused(content: Any, name: str = "resnet18") -> str:
        torch.save(content, path)
        with pytest.raises((ValueError, OSError)) as error:
            pretrained(name, str(path))
        assert str(path) in str(error.value)
        return str(error.value)

    state = torchvision.models.resnet18().state_dict()
    assert "lacks layer1.2.conv1.weight" in refused(state, "resnet34")
    assert "has unknown module.conv1.weight" in refused(
        {**state, "module.conv1.weight": state["conv1.weight"]}
    )
    wide = {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    assert "conv1.weight is [64, 1, 7, 7], must be [64, 3, 7, 7]" in refused(wide)
    assert "must be a state dict" in refused({"state_dict": state})
    assert "cannot be read" in refused(torchvision.models.resnet18())
    path.write_bytes(b"no weights")
    with pytest.raises(OSError, match=r"weights\.pth must be a state dict .* cannot be read"):
        pretrained("resnet18", str(path))
    with pytest.raises(FileNotFoundError, match=r"imagenet, none or a file, but .*imagnet is not"):
        pretrained("resnet18", "imagnet")


def test_an_impossible_download_says_which_file_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(url: str, **keywords: Any) -> None:
        assert url.endswith("/resnet34-b627a593.pth")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    with pytest.raises(
        OSError, match=r"resnet34-b627a593\.pth .*no network.*--model\.weights PATH"
    ):
        pretrained("resnet34", "imagenet")


def test_the_downloaded_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision looks in the folder of torch.hub first, and checks the file's hash in its name
    on downloads only."""
    state = torchvision.models.resnet18().state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / extractors.FILES["resnet18"])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    loaded = pretrained("resnet18", "imagenet")
    assert loaded is not None
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert {key for key in state if key not in loaded} == {"fc.weight", "fc.bias"}
