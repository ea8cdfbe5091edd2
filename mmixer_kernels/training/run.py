"""A run from its folder to its result, and the evaluation of what it left there."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..data import ArraysOptions, Data, Split
from ..data import check as preflight
from ..data.video import VideoOptions
from ..files import replacing
from . import (
    checkpoint,
    distributed,
    loop,
    missing,
    mixed_precision,
    model,
    plots,
    result,
    streams,
    toml,
)
from .command import UserError, user_errors
from .options import Options, Precision, automatic_device, differences, parse_config

Samples = Literal["all", "shapes", "none"]
"""What `restore` needs of a data set."""
NEED_NO_FILES: dict[Samples, tuple[type, ...]] = {
    "all": (),
    "shapes": (VideoOptions,),
    "none": (VideoOptions, ArraysOptions),
}
"""The data sets that a checkpoint alone tells enough of."""
PRODUCTS = ("last.pt", "previous.pt", "best.pt", "result.json")


def train(options: Options) -> dict[str, Any]:
    """Trains, tests the selected epoch once and writes everything in the run's folder; in all the
    processes that torchrun started.

    Returns:
        The contents of result.json.

    Raises:
        UserError: what the user asked for cannot be done.
        loop.Interrupted: a signal stopped the training; last.pt has the position, if a step was
            taken.
    """
    device = device_of(options.run.device)
    with distributed.job(device):
        return _train(options, device)


def _train(options: Options, device: torch.device) -> dict[str, Any]:
    output, first = options.output, distributed.is_first()
    # cuDNN's other algorithms add up in any order: equal runs would differ.
    torch.backends.cudnn.deterministic = True
    with distributed.together():
        resumed = _resumed(options) if options.run.resume else None
        if resumed is None:
            _refuse_overwriting(output)
        torch.manual_seed(options.run.seed)
        data, recognizer, engine = build(options, device, initial=resumed is None)
        _check_shares(options, data)
        if resumed is not None:
            _check_data(resumed.state["data"], loop.identity(data), resumed.path)
        mixed_precision.check(recognizer, data.train, options.run)
    if resumed is not None:
        _note_other_hardware(resumed, device)
    distributed.seed(options.run.seed)
    trainer = loop.Trainer(options, data, recognizer)
    if resumed is not None:
        trainer.load_state(resumed.state)
    with distributed.together(), user_errors():
        if first:
            output.mkdir(parents=True, exist_ok=True)
            if resumed is not None:
                checkpoint.set_damaged_aside(resumed)
            with replacing(output / "config.toml") as file:
                file.write(toml.dumps(options.config()).encode())
    if first:
        print(_describe_step(options, trainer), file=sys.stderr)
    with loop.Stop() as stop:
        trainer.fit(output, stop)

    selected = f"{options.run.select}.pt"
    recognizer.load_state_dict(checkpoint.load(output / selected)["model"])
    record = trainer.best() if options.run.select == "best" else trainer.history[-1]
    test = loop.evaluate(
        recognizer, data.test, len(data.classes), options.run.loader, options.run.precision
    )
    report = {
        **test.report(data.classes),
        "modalities": list(data.modalities),
        "checkpoint": selected,
        "epoch": record["epoch"],
        "validation": {
            key.removeprefix("validation_"): value
            for key, value in record.items()
            if key.startswith("validation_")
        },
        "seed": options.run.seed,
        "engine": engine,
        "device": options.run.device,
        "processes": distributed.world(),
        "effective_batch_size": trainer.effective_batch_size,
        "learning_rate": options.run.optimizer.learning_rate,
        "threads": torch.get_num_threads(),
        "versions": result.versions(),
        "config": options.config(),
    }
    if first:
        with replacing(output / "result.json") as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
        plots.write(output, trainer.history, report)
    return report


def evaluate(
    path: Path,
    split: str,
    root: Path | None,
    batch_size: int | None,
    workers: int | None,
    with_streams: bool = False,
    with_missing: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """The report of a checkpoint's weights on a split.

    Args:
        split: "validation" or "test".
        root: folder of the data set's files where it is not the run's.
        batch_size, workers: the run's when None.
        with_streams: adds "streams", the report of a classifier on each modality's state (Eq. 15),
            and writes the classifiers beside the checkpoint.
        with_missing: adds "missing", the numbers with a modality absent or noised, as
            `missing.evaluate` has them.
        device: as in `restore`.
        precision: the run's when None.

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together; or the
            network cannot be computed in the precision on the device.
    """
    if with_streams and not os.access(path.parent, os.W_OK):
        raise UserError(
            f"{path.parent} cannot be written, and the classifiers of the streams belong there: "
            "copy the checkpoint to a folder of your own"
        )
    state, options = _remembered(path, root, batch_size, workers, device, precision)
    place = device_of(options.run.device)
    with distributed.job(place):
        with distributed.together():
            restored = _restored(state, options, path, place)
            samples = restored.data.test if split == "test" else restored.data.validation
            mixed_precision.check(restored.model, samples, options.run)
        return _evaluate(restored, path, split, samples, with_streams, with_missing)


def _evaluate(
    restored: Restored,
    path: Path,
    split: str,
    samples: Split,
    with_streams: bool,
    with_missing: bool,
) -> dict[str, Any]:
    data, recognizer = restored.data, restored.model
    loader, precision = restored.options.run.loader, restored.options.run.precision
    evaluation = loop.evaluate(recognizer, samples, len(data.classes), loader, precision)
    report = {
        "checkpoint": str(path),
        "split": split,
        "epoch": restored.epoch,
        "engine": restored.engine,
        "device": restored.options.run.device,
        "precision": precision,
        **evaluation.report(data.classes),
    }
    if with_streams:
        heads = streams.train_heads(recognizer, data, loader, precision)
        alone = streams.evaluate_streams(recognizer, heads, samples, loader, precision)
        report["streams"] = {
            modality: part.report(data.classes)
            for modality, part in zip(data.modalities, alone, strict=True)
        }
        with distributed.together(), user_errors():
            if distributed.is_first():
                streams.save_heads(heads, recognizer, path)
    if with_missing:
        report["missing"] = missing.evaluate(
            recognizer, samples, data.modalities, len(data.classes), loader, precision
        )
    return report


class Restored(NamedTuple):
    """A checkpoint's network, in evaluation mode, and what it goes with."""

    options: Options
    data: Data
    model: model.Recognizer
    engine: str | None
    epoch: int


def restore(
    path: Path,
    root: Path | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    samples: Samples = "all",
) -> Restored:
    """The network of a checkpoint with its weights, and the data set that it was trained on.

    Where the run's engine cannot run on the device, a note on stderr says so and auto takes its
    place.

    Args:
        root: folder of the data set's files where it is not the run's.
        batch_size, workers: the run's when None.
        device: auto is the run's; where that cannot be used here, a note on stderr says so and
            the device is what auto is for a training.
        samples: "all" of them; or what else is needed of the data set: a sample's "shapes", or
            "none". Files of video are then not read, nor, for "none", those of arrays, and their
            splits are empty.

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together.
    """
    state, options = _remembered(path, root, batch_size, workers, device)
    return _restored(state, options, path, device_of(options.run.device), samples)


def _remembered(
    path: Path,
    root: Path | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
    precision: Precision | None = None,
) -> tuple[dict[str, Any], Options]:
    """A checkpoint, and its options with what the user gives instead."""
    state = checkpoint.load(path)
    if "config" not in state:
        raise UserError(f"{path} holds the classifiers of streams: give the network's checkpoint")
    options = parse_config(state["config"], f"the checkpoint {path}")
    loader = {"batch_size": batch_size, "workers": workers}
    given = {name: value for name, value in loader.items() if value is not None}
    with user_errors():
        changed = replace(options.run.loader, **given)
    run = replace(
        options.run,
        loader=changed,
        root=options.run.root if root is None else root,
        device=_device_here(options.run.device, path) if device == "auto" else device,
        precision=options.run.precision if precision is None else precision,
    )
    return state, replace(options, run=run)


def _device_here(name: str, path: Path) -> str:
    """The device of a checkpoint's run, or what there is instead."""
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
    """Options of a network for evaluation on any device."""
    # Outside training it computes what batch norm does, and PyTorch has it on GPUs only.
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


def _restored(
    state: dict[str, Any],
    options: Options,
    path: Path,
    device: torch.device,
    samples: Samples = "all",
) -> Restored:
    saved = state["data"]
    options = _portable(options, device, path)
    if isinstance(options.data, NEED_NO_FILES[samples]):
        known = _without_samples(saved)
        data, recognizer, engine = build(options, device, initial=False, data=known)
    else:
        data, recognizer, engine = build(options, device, initial=False)
        _check_data(saved, loop.identity(data), path, also_samples=False)
    recognizer.load_state_dict(state["model"])
    return Restored(options, data, recognizer.eval(), engine, state["epoch"])


def check(options: Options) -> preflight.Report:
    """What a look at the data set's files finds, without training.

    Raises:
        UserError: the data set is not one of video, or has no files at all.
    """
    if not isinstance(options.data, VideoOptions):
        raise UserError(f"--check is for data sets of video, but --data is {options.run.data}")
    with user_errors(BrokenProcessPool):
        return preflight.check(
            options.data,
            options.run.root,
            full="full" in (options.run.check or ()),
            workers=options.run.loader.workers,
            progress=lambda results, total: tqdm(results, "check", total, unit=" samples"),
        )


def build(
    options: Options, device: torch.device, initial: bool, data: Data | None = None
) -> tuple[Data, model.Recognizer, str | None]:
    """The data set, the network on its device, and the engine that computes it.

    Args:
        initial: whether its initial weights matter, as in `model.build`.
        data: the data set; loaded when None.
    """
    with user_errors():
        data = options.load_data() if data is None else data
        built = model.build(options.run.model, data, initial)
        recognizer = model.place(built, options.run, device)
    with user_errors(RuntimeError):
        return data, recognizer, result.engine_used(options.run.model, device)


def _without_samples(saved: dict[str, Any]) -> Data:
    """A data set of frames or of features as a checkpoint remembers it."""
    none = Split(torch.zeros(0, dtype=torch.int64))
    names = tuple(saved["modalities"]), tuple(saved["classes"])
    if saved["feature_sizes"] is None:
        return Data(*names, none, none, none, extractors=None, feature_sizes=None)
    sizes = tuple(saved["feature_sizes"])
    identities: list[nn.Module] = [nn.Identity() for _ in sizes]
    moments = saved.get("moments")
    return Data(
        *names, none, none, none, extractors=identities, feature_sizes=sizes, moments=moments
    )


def _refuse_overwriting(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is not a folder: choose another one")
    found = [name for name in PRODUCTS if (output / name).exists()]
    if found:
        kind = "a finished" if "result.json" in found else "an interrupted"
        raise UserError(
            f"{output} holds {kind} run ({', '.join(found)}): go on with it by --resume, or "
            "choose another folder by --output"
        )


def _check_shares(options: Options, data: Data) -> None:
    """Synchronized batch norm needs every process in every batch."""
    world = distributed.world()
    last = len(data.train) % (options.run.loader.batch_size * world)
    if options.run.model.sync_batch_norm and 0 < last < world:
        raise UserError(
            f"--model.sync-batch-norm needs a sample for each process, but the last batch of "
            f"{len(data.train)} samples has {last} for {world}: choose another --loader.batch-size"
        )


def _describe_step(options: Options, trainer: loop.Trainer) -> str:
    run, world = options.run, distributed.world()
    return (
        f"effective batch size {trainer.effective_batch_size}: {run.loader.batch_size} samples x "
        f"{world} {'process' if world == 1 else 'processes'} x {run.optimizer.accumulate} added "
        f"up; learning rate {run.optimizer.learning_rate:g}, which does not follow the batch size"
    )


def _resumed(options: Options) -> checkpoint.Last:
    """last.pt or previous.pt, of a run with the same options."""
    last, previous = options.output / checkpoint.LAST, options.output / checkpoint.PREVIOUS
    if not last.exists() and not previous.exists():
        raise UserError(
            f"--resume found no checkpoint {last}: leave out --resume to start, or name the run's "
            "folder by --output"
        )
    state, path = found = checkpoint.load_last(options.output)
    saved, now = (decisive(config) for config in (state["config"], options.config()))
    if now["optimizer"]["schedule"] == "constant" and now["epochs"] >= saved["epochs"]:
        # With a constant rate a longer run begins with the very steps of a shorter one.
        saved["epochs"] = now["epochs"]
    changed = differences(saved, now)
    if changed:
        raise UserError(
            f"--resume needs the options of {path}, but {'; '.join(changed)} (only the epochs of "
            "a constant schedule can grow): start another run by --output"
        )
    if state["processes"] != distributed.world():
        raise UserError(
            f"--resume needs the {state['processes']} processes of {path}, but there are "
            f"{distributed.world()}: sums would be rounded otherwise, and dropout would be "
            "another; start torchrun with as many, or another run by --output"
        )
    if state["threads"] != torch.get_num_threads() and distributed.is_first():
        print(
            f"note: {path} was written with {state['threads']} threads, now there are "
            f"{torch.get_num_threads()}: the last bits may differ from an uninterrupted run's",
            file=sys.stderr,
        )
    return found


def _note_other_hardware(resumed: checkpoint.Last, device: torch.device) -> None:
    """Every process has to call it."""
    now = distributed.gather(result.hardware(device))
    before = resumed.state.get("hardware", now)  # older versions do not write it
    if before != now and distributed.is_first():
        print(
            f"note: {resumed.path} was written on {', '.join(before)}, now it is "
            f"{', '.join(now)}: the last bits, and a GPU's draws for dropout, may differ from an "
            "uninterrupted run's",
            file=sys.stderr,
        )


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no result; of the device its kind is kept."""
    kept = {key: config[key] for key in config if key not in ("root", "checkpoint_steps")}
    loader = {key: value for key, value in config["loader"].items() if key != "workers"}
    return {**kept, "device": config["device"].partition(":")[0], "loader": loader}


def _check_data(
    saved: dict[str, Any], now: dict[str, Any], path: Path, also_samples: bool = True
) -> None:
    names = [name for name in saved if also_samples or name != "samples"]
    for name in names:
        if name == "moments" and saved[name] != now[name]:
            raise UserError(
                f"the data set is not that of {path}: its training samples have another mean or "
                "standard deviation, by which --standardize brings all samples"
            )
        if saved[name] != now[name]:
            raise UserError(
                f"the data set is not that of {path}: {name} was {saved[name]}, is {now[name]}"
            )


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
        device = distributed.own_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here: {reason}: choose another, or auto"
        ) from error
    return device
