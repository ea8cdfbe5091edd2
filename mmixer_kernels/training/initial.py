"""The initial weights of a training that are another run's (`--init-from`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import Data
from ..data.video import first
from ..errors import UserError
from . import checkpoint
from .model import Recognizer
from .options import Options
from .parsing import differences, parse_config

NETWORK = ("hidden_size", "unit", "summarizer", "content", "mix", "layer_norm")
"""The options of the model without which its weights are another network's."""
CLASSIFIER = "mixer.classifier."


def load(recognizer: Recognizer, path: Path, options: Options, data: Data) -> list[str]:
    """Gives a network the weights of another run's checkpoint, those of its extractors included.

    The classifier keeps its own initial weights unless both have the same classes in the same
    order: names that are numbers, as those of arrays, do not tell which single class is the same.

    Args:
        options: those of the run that begins, `data` its data set.

    Returns:
        Lines that tell what was taken, which tensors start anew and why, and what else differs.

    Raises:
        UserError: the checkpoint cannot be read, or is of another network or other modalities.
    """
    state = checkpoint.load(path)
    if "config" not in state:
        raise UserError(f"{path} holds the classifiers of streams: give the network's checkpoint")
    before = parse_config(state["config"], f"the checkpoint {path}")
    saved, own = state["data"], recognizer.state_dict()
    anew = []
    if saved["classes"] != list(data.classes):
        anew = [name for name in own if name.startswith(CLASSIFIER)]
    weights = {name: value for name, value in state["model"].items() if name not in anew}
    problems = [*_other_options(NETWORK, before, options), *_other_modalities(saved, data)]
    if not problems and (tensors := _other_tensors(weights, own, anew)):
        problems = [*_other_options(("extractor",), before, options), *tensors]
    if problems:
        raise UserError(f"--init-from {path} is of another network: {'; '.join(problems)}")
    recognizer.load_state_dict(weights, strict=False)
    return [
        f"initial weights of {path}, epoch {state['epoch']}: {len(weights)} tensors",
        *_started_anew(path, saved["classes"], data.classes, anew),
        *_notes(path, before, options, zip(saved["modalities"], data.modalities, strict=True)),
    ]


def _other_options(names: Sequence[str], before: Options, now: Options) -> list[str]:
    models = [
        {"model": {name: getattr(options.run.model, name) for name in names}}
        for options in (before, now)
    ]
    return differences(*models)


def _other_modalities(saved: Mapping[str, Any], data: Data) -> list[str]:
    """The modalities' number, order and sizes of features that are not the same; their names may
    be others."""
    before, now = saved["modalities"], list(data.modalities)
    if len(before) != len(now) or (before != now and set(before) == set(now)):
        return [f"its modalities were {', '.join(before)}, are {', '.join(now)}"]
    kinds = [
        [f"features of size {size}" for size in sizes] if sizes else ["frames"] * len(now)
        for sizes in (saved["feature_sizes"], data.feature_sizes)
    ]
    pairs = zip(now, *kinds, strict=True)
    return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]


def _other_tensors(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], anew: Sequence[str]
) -> list[str]:
    """The tensors, other than those that start anew, which only one of both has, or in another
    shape."""
    shapes = [
        {name: list(value.shape) for name, value in state.items() if name not in anew}
        for state in (weights, own)
    ]
    before, now = shapes
    problems = [
        f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return [first(problems)] if problems else []


def _started_anew(
    path: Path, before: Sequence[str], now: Sequence[str], tensors: Sequence[str]
) -> list[str]:
    if not tensors:
        return []
    classes = [f"{len(names)} ({first(names)})" for names in (before, now)]
    return [
        f"{' and '.join(tensors)} start anew: the classes of {path} were {classes[0]}, here they "
        f"are {classes[1]}"
    ]


def _notes(
    path: Path, before: Options, now: Options, modalities: Iterable[tuple[str, str]]
) -> list[str]:
    notes = [
        f"note: {name} starts from the weights of {old}" for old, name in modalities if old != name
    ]
    was, is_now = (getattr(options.data, "standardize", None) for options in (before, now))
    if was != is_now:
        notes.append(
            f"note: --standardize was {was} in {path}, here it is {is_now}: its weights have seen "
            "features of another scale"
        )
    return notes
