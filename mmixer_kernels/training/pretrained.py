"""Pretrained weights of an extractor's network: torchvision's, or those of a file."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import extractors
from .extractors import Extractor

ENTRIES = {"imagenet": "IMAGENET1K_V1", "kinetics400": "KINETICS400_V1"}
"""torchvision's names of the weights that have a name here."""
TABLES = ("state_dict", "model", "model_state", "model_state_dict")
"""The keys under which programs that train torchvision's networks write the state dict."""
HELPERS = ("aux1.", "aux2.", "AuxLogits.")
"""The classifiers of googlenet and inception_v3 that help in training only."""


def load(networks: Sequence[Extractor], weights: str) -> None:
    """Gives extractors of one name their first weights.

    Args:
        weights: "auto"; "imagenet" or "kinetics400", the first weights that torchvision published
            of a network of images or of video, and "pretrained", those that it names the default,
            each downloaded once; "none", which leaves the random ones; or the path of a file with
            torchvision's names. auto is imagenet or kinetics400. The file may hold the state dict
            as one of TABLES, with `module.` before all names; the classifiers are left out.

    Raises:
        OSError: the download fails, or the file cannot be read.
        ValueError: torchvision has no such weights, or the file holds something else; the message
            names file and keys.
    """
    first = networks[0]
    if weights == "auto":
        weights = "kinetics400" if first.joins_steps else "imagenet"
    if weights == "none":
        return
    if weights in (*ENTRIES, "pretrained"):
        entry = _entry(first.name, weights)
        source, state = _file_name(entry), _downloaded(entry)
    else:
        source, state = weights, _read(Path(weights))
    state = _without_classifiers(state, first)
    for extractor in networks:
        _load(extractor, state, source)


def _entry(network: str, weights: str) -> Any:
    """torchvision's entry of a network's weights."""
    default = extractors.default_weights(network)
    entries = {entry.name: entry for entry in type(default)}
    name = default.name if weights == "pretrained" else ENTRIES[weights]
    if name not in entries:
        others = [other for other, entry in ENTRIES.items() if entry in entries]
        raise ValueError(
            f"--model.weights must be {', '.join(('pretrained', *others))}, none or a file for "
            f"--model.extractor {network}, but is {weights}, of which torchvision has no "
            "weights"
        )
    return entries[name]


def _file_name(entry: Any) -> str:
    return entry.url.rpartition("/")[2]


def _downloaded(entry: Any) -> dict[str, Tensor]:
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"torchvision's weights {_file_name(entry)} are not in {folder} and cannot be "
            f"downloaded ({error}): bring that file here and give it by --model.weights PATH, or "
            "begin with random weights by --model.weights none"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--model.weights must be {', '.join(ENTRIES)}, pretrained, none or a file, but {path} "
            "is not a file"
        )
    try:
        # torchvision's own training program writes its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(
            f"{path} must be a state dict as torch.save writes it, but cannot be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    tables = [content]
    if isinstance(content, dict):
        tables += [content[key] for key in TABLES if key in content]
    for table in tables:
        if isinstance(table, dict) and table and all(map(torch.is_tensor, table.values())):
            if all(key.startswith("module.") for key in table):
                nn.modules.utils.consume_prefix_in_state_dict_if_present(table, "module.")
            return table
    raise ValueError(
        f"{path} must be a state dict, tensors by name, or hold one as {' or '.join(TABLES)}, but "
        "does not"
    )


def _without_classifiers(state: dict[str, Tensor], extractor: Extractor) -> dict[str, Tensor]:
    """The state dict of an extractor's network, with the versions that PyTorch keeps beside it."""
    left_out = (f"{extractor.classifier}.", *HELPERS)
    kept = OrderedDict(
        # densenet's files have names that PyTorch no longer allows.
        (re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key), value)
        for key, value in state.items()
        if not key.startswith(left_out)
    )
    if hasattr(state, "_metadata"):
        kept._metadata = state._metadata  # type: ignore[attr-defined]
    return kept


def _load(extractor: Extractor, state: dict[str, Tensor], source: str) -> None:
    expected = extractor.network.state_dict()
    wrong = {
        key: f"{key} is {list(value.shape)}, must be {list(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    }
    for key in wrong:
        del state[key]  # which PyTorch would end at, without naming the other problems
    # PyTorch and torchvision know the names of older versions, so they are the ones to ask.
    lacking, unknown = extractor.network.load_state_dict(state, strict=False)
    missing = [
        # Files from before torch 0.4.1 have no num_batches_tracked, and PyTorch reads them.
        key
        for key in lacking
        if key not in wrong and not key.endswith("num_batches_tracked")
    ]
    problems = [
        f"{kind} {_few(keys)}"
        for kind, keys in (
            ("lacks", missing),
            ("has unknown", unknown),
            ("has wrong sizes:", list(wrong.values())),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{source} must hold the weights of torchvision's {extractor.name}, but "
            f"{'; '.join(problems)}: choose the network by --model.extractor"
        )


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
