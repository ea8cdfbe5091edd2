from __future__ import annotations

import argparse
import re
import urllib.error
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from mmixer_kernels.training import extractors, pretrained


def loaded(name: str, weights: str | Path) -> nn.Module:
    """A network with these weights."""
    extractor = extractors.build(name)
    pretrained.load([extractor], str(weights))
    return extractor.network


def assert_has(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["resnet18", "r3d_18"])
def test_a_local_file_gives_its_weights_to_every_network(name: str, tmp_path: Path) -> None:
    state = torchvision.models.get_model(name).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    networks = [extractors.build(name) for _ in range(2)]
    pretrained.load(networks, str(tmp_path / "weights.pth"))
    for extractor in networks:
        assert_has(extractor.network, state)


@pytest.mark.parametrize("name", ["googlenet", "mnasnet0_5", "squeezenet1_1"])
def test_files_of_training_programs_fit(name: str, tmp_path: Path) -> None:
    """They have the weights in a table, and names of DistributedDataParallel; googlenet has two
    classifiers more, and mnasnet's way of loading depends on a version beside the tensors."""
    arguments = {"init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, **arguments)
    state = theirs.state_dict()
    path = tmp_path / "weights.pth"
    for content in (
        {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        {"state_dict": nn.DataParallel(theirs).state_dict(), "optimizer": {"state": {}}},
    ):
        torch.save(content, path)
        assert_has(loaded(name, path), state)


def test_names_of_older_versions_fit(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    old = {
        key: value
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    torch.save(old, path)
    network = loaded("resnet18", path)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in old.items())
    dense = torchvision.models.densenet121().state_dict()
    pattern = r"(denselayer\d+\.(?:norm|conv))([12])\."
    torch.save(
        OrderedDict((re.sub(pattern, r"\1.\2.", key), value) for key, value in dense.items()), path
    )
    assert_has(loaded("densenet121", path), dense)


@pytest.mark.slow
def test_vits_names_of_older_versions_fit(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    vit = torchvision.models.vit_b_32().state_dict()
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    renamed = {re.sub(r"mlp\.[03]\.", lambda m: names[m.group()], k): v for k, v in vit.items()}
    assert renamed.keys() != vit.keys()
    torch.save(renamed, path)
    assert_has(loaded("vit_b_32", path), vit)


def test_wrong_files_are_named_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refused(content: Any, name: str = "resnet18") -> str:
        torch.save(content, path)
        with pytest.raises((ValueError, OSError)) as error:
            loaded(name, path)
        assert str(path) in str(error.value)
        return str(error.value)

    state = torchvision.models.resnet18().state_dict()
    assert "lacks layer1.2.conv1.weight" in refused(state, "resnet34")
    assert "lacks stem.0.weight" in refused(state, "r3d_18")
    assert "has unknown module.conv1.weight" in refused(
        {**state, "module.conv1.weight": state["conv1.weight"]}
    )
    wide = {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    assert "but has wrong sizes: conv1.weight is [64, 1, 7, 7], must be [64, 3, 7, 7]:" in refused(
        wide
    )
    assert "must be a state dict" in refused({"epoch": 1})
    assert "must be a state dict" in refused({"weights": state})
    assert "cannot be read" in refused(torchvision.models.resnet18())
    path.write_bytes(b"no weights")
    with pytest.raises(OSError, match=r"weights\.pth must be a state dict .* cannot be read"):
        loaded("resnet18", path)
    with pytest.raises(FileNotFoundError, match=r"imagenet, .*none or a file, but .*imagnet is"):
        loaded("resnet18", "imagnet")


@pytest.mark.parametrize(
    ("name", "weights", "file"),
    [
        ("resnet34", "auto", "resnet34-b627a593.pth"),
        ("resnet50", "imagenet", "resnet50-0676ba61.pth"),
        ("resnet50", "pretrained", "resnet50-11ad3fa6.pth"),
        ("r3d_18", "auto", "r3d_18-b3b3357e.pth"),
        ("swin3d_t", "kinetics400", "swin3d_t-7615ae03.pth"),
    ],
)
def test_an_impossible_download_says_which_file_to_bring(
    name: str, weights: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(url: str, **keywords: Any) -> None:
        assert url.endswith(f"/{file}")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    with pytest.raises(OSError, match=rf"{re.escape(file)} .*no network.*--model\.weights PATH"):
        loaded(name, weights)


@pytest.mark.parametrize(
    ("name", "weights", "known"),
    [
        ("r3d_18", "imagenet", "pretrained, kinetics400, none or a file"),
        ("resnet18", "kinetics400", "pretrained, imagenet, none or a file"),
    ],
)
def test_weights_that_torchvision_does_not_have_are_told(
    name: str, weights: str, known: str
) -> None:
    with pytest.raises(ValueError, match=rf"{known} for --model\.extractor {name}, but is"):
        loaded(name, weights)


def test_the_downloaded_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision looks in the folder of torch.hub first, and checks the file's hash in its name
    on downloads only."""
    state = torchvision.models.resnet18().state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for weights in ("auto", "imagenet", "pretrained"):
        assert_has(loaded("resnet18", weights), state)


def test_none_leaves_the_random_weights() -> None:
    extractor = extractors.build("squeezenet1_1")
    before = {key: value.clone() for key, value in extractor.network.state_dict().items()}
    pretrained.load([extractor], "none")
    assert_has(extractor.network, before)
