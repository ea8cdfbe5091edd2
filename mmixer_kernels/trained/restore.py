"""A checkpoint's network with its weights, and the data set that it goes with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..data import ArraysOptions, Data, Split
from ..data.video import VideoOptions
from ..errors import UserError, user_errors
from ..training import checkpoint, distributed, loop, model, result
from ..training.options import Options, Precision, automatic_device
from ..training.parsing import parse_config
from ..training.run import build, check_data, device_of

Samples = Literal["all", "shapes", "none"]
"""The part of a data set that `restore` is to provide."""
NEED_NO_FILES: dict[Samples, tuple[type, ...]] = {
    "all": (),
    "shapes": (VideoOptions,),
    "none": (VideoOptions, ArraysOptions),
}
"""The data sets of which a checkpoint alone tells enough."""


class Overrides(NamedTuple):
    """Options of a run that the user gives anew: a folder of the data set's files, options of the
    loader, a device, a precision.

    None leaves the run's. The device auto is the run's too; where that cannot be used here, a note
    on stderr says so and the device is the one that auto is for a training.
    """

    root: Path | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    precision: Precision | None = None


AS_TRAINED = Overrides()


class Restored(NamedTuple):
    """A checkpoint's network, in evaluation mode, and what it goes with."""

    options: Options
    """The run's options, with the overrides."""
    data: Data
    """The data set; its splits are empty where samples were not asked for."""
    model: model.Recognizer
    """The network, on the device of the options. It takes inputs as the data set's splits have
    them: where `data.moments` is not None, features that `data.standardize.Standardize` has brought
    to them."""
    engine: str | None
    """The engine that computes its MCUs; None for units that are PyTorch's own."""
    epoch: int
    """The epoch that the weights are of."""


def restore(
    path: Path | str, overrides: Overrides = AS_TRAINED, samples: Samples = "all"
) -> Restored:
    """The network of a checkpoint with its weights, and the data set that it was trained on.

    Where the run's engine cannot run on the device, a note on stderr says so and auto takes its
    place.

    Args:
        path: the checkpoint.
        overrides: options that are not the run's.
        samples: "all" of them, a sample's "shapes", or "none". Without "all", files of video are
            not read, nor, for "none", those of arrays, and their splits are empty.

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together.
    """
    path = Path(path)
    state, options = read(path, overrides)
    return rebuild(state, options, path, device_of(options.run.device), samples)


def tell_device(restored: Restored) -> None:
    """Tells on stderr which device and engine compute a network, in the first process."""
    if distributed.is_first():
        device = next(restored.model.parameters()).device
        line = result.describe_device(restored.options, device, restored.engine)
        print(line, file=sys.stderr)


def read(path: Path, overrides: Overrides) -> tuple[dict[str, Any], Options]:
    """Reads a checkpoint; gives its state, and its options with the overrides."""
    state = checkpoint.load(path)
    if "config" not in state:
        raise UserError(f"{path} holds the classifiers of streams: give the network's checkpoint")
    options = parse_config(state["config"], f"the checkpoint {path}")
    given = {name: value for name, value in overrides._asdict().items() if value is not None}
    loader = {name: given.pop(name) for name in ("batch_size", "workers") if name in given}
    if overrides.device == "auto":
        given["device"] = _device_here(options.run.device, path)
    with user_errors():
        run = replace(options.run, loader=replace(options.run.loader, **loader), **given)
    return state, replace(options, run=run)


def _device_here(name: str, path: Path) -> str:
    """The name of the device of a checkpoint's run, or of the one that there is instead."""
    instead = automatic_device()
    try:
        device_of(name)
    except UserError as error:
        if name == instead:
            raise
        if distributed.is_first():
            print(
                f"note: {path} is of a run with --device {name}, and {error}; "
                f"it is restored on {instead}",
                file=sys.stderr,
            )
        return instead
    return name


def _portable(options: Options, device: torch.device, path: Path) -> Options:
    """The options of a network for evaluation on any device."""
    # Synchronized batch norm runs on GPUs only; outside training, batch norm computes the same.
    chosen = replace(options.run.model, sync_batch_norm=False)
    try:
        result.engine_used(chosen, device)
    except (RuntimeError, ValueError) as error:
        if chosen.engine == "auto":
            raise UserError(str(error)) from error
        if distributed.is_first():
            print(
                f"note: {path} is of a run with --model.engine {chosen.engine}, but {error}; "
                "it is restored with auto",
                file=sys.stderr,
            )
        chosen = replace(chosen, engine="auto")
    return replace(options, run=replace(options.run, model=chosen))


def rebuild(
    state: dict[str, Any],
    options: Options,
    path: Path,
    device: torch.device,
    samples: Samples = "all",
) -> Restored:
    """The network and data set of a checkpoint that `read` has read; `samples` as in `restore`."""
    saved = state["data"]
    options = _portable(options, device, path)
    if isinstance(options.data, NEED_NO_FILES[samples]):
        known = _without_samples(saved)
        data, recognizer, engine = build(options, device, initial=False, data=known)
    else:
        data, recognizer, engine = build(options, device, initial=False)
        check_data(saved, loop.identity(data), path, also_samples=False)
    recognizer.load_state_dict(state["model"])
    return Restored(options, data, recognizer.eval(), engine, state["epoch"])


def _without_samples(saved: dict[str, Any]) -> Data:
    """A data set of frames or of features as a checkpoint remembers it, with empty splits."""
    none = Split(torch.zeros(0, dtype=torch.int64))
    names = tuple(saved["modalities"]), tuple(saved["classes"])
    if saved["feature_sizes"] is None:
        steps, forms = saved.get("steps"), saved.get("forms")
        return Data(*names, none, none, none, None, None, steps=steps, forms=forms)
    sizes = tuple(saved["feature_sizes"])
    identities: list[nn.Module] = [nn.Identity() for _ in sizes]
    moments = saved.get("moments")
    return Data(
        *names, none, none, none, extractors=identities, feature_sizes=sizes, moments=moments
    )
