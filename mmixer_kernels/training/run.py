"""A training run, from its folder to its result."""

from __future__ import annotations

import json
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..atomic import replacing
from ..data import Data
from ..data import check as preflight
from ..data.base import Moments
from ..data.video import VideoOptions
from ..errors import UserError, user_errors
from ..stop import Stop
from . import checkpoint, distributed, initial, loop, mixed_precision, model, plots, result, toml
from .options import Options
from .parsing import differences, parse_config

ROUNDING = 1e-9
"""Greatest difference between moments of equal samples, as a fraction of mean and deviation."""
PRODUCTS = ("last.pt", "previous.pt", "best.pt", "result.json")


def train(options: Options) -> dict[str, Any]:
    """Trains, tests the selected epoch once and writes everything in the run's folder; in all the
    processes that torchrun started.

    Returns:
        The contents of result.json.

    Raises:
        UserError: what the user asked for cannot be done.
        stop.Interrupted: a signal stopped the training; last.pt has the position, if a step was
            taken.
    """
    device = device_of(options.run.device)
    with distributed.job(device):
        return _train(options, device)


def _train(options: Options, device: torch.device) -> dict[str, Any]:
    output, first = options.output, distributed.is_first()
    # cuDNN's other algorithms add up in any order: equal runs would differ.
    torch.backends.cudnn.deterministic = True
    with distributed.fail_together():
        resumed = _resumed(options) if options.run.resume else None
        if resumed is None:
            _refuse_overwriting(output)
        with user_errors(RuntimeError):
            engine = result.engine_used(options.run.model, device)
        if first:
            print(result.describe_device(options, device, engine), file=sys.stderr)
        torch.manual_seed(options.run.seed)
        source = options.run.init_from if resumed is None else None
        initial_weights = resumed is None and source is None
        data, recognizer, _ = build(options, device, initial_weights)
        if source is not None:
            lines = initial.load(recognizer, source, options, data)
            with user_errors():
                model.check_sample(recognizer, data)  # the other run's samples may have another T
            if first:
                print("\n".join(lines), file=sys.stderr)
        _check_shares(options, data)
        _check_sampling(options, data)
        if resumed is not None:
            check_data(resumed.state["data"], loop.identity(data), resumed.path)
        mixed_precision.check(recognizer, data.train, options.run)
    if resumed is not None:
        _note_other_hardware(resumed, device)
    distributed.seed(options.run.seed)
    trainer = loop.Trainer(options, data, recognizer)
    if resumed is not None:
        trainer.load_state(resumed.state)
    with distributed.fail_together(), user_errors():
        if first:
            output.mkdir(parents=True, exist_ok=True)
            if resumed is not None:
                checkpoint.set_damaged_aside(resumed)
            with replacing(output / "config.toml") as file:
                file.write(toml.dumps(options.config()).encode())
    if first:
        print(_describe_step(options, trainer), file=sys.stderr)
    with Stop(distributed.gather) as stop:
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
        if options.run.plots:
            plots.write(output, trainer.history, report)
    return report


def check(options: Options) -> preflight.Report:
    """Looks at the data set's files, without training, and reports what it finds.

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
            seed=options.run.seed,
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
        if initial:
            model.check_sample(built, data)
        recognizer = model.place(built, options.run, device)
    with user_errors(RuntimeError):
        return data, recognizer, result.engine_used(options.run.model, device)


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
    """Raises UserError where synchronized batch norm lacks a process in the last batch."""
    world = distributed.world()
    last = len(data.train) % (options.run.loader.batch_size * world)
    if options.run.model.sync_batch_norm and 0 < last < world:
        raise UserError(
            f"--model.sync-batch-norm needs a sample for each process, but the last batch of "
            f"{len(data.train)} samples has {last} for {world}: choose another --loader.batch-size"
        )


def _check_sampling(options: Options, data: Data) -> None:
    """Raises UserError where epochs draw samples anew, so that none has one class in all of them.

    The labels of such a set are those of an epoch, not those of its samples without augmentation.
    """
    if options.run.loader.sampling == "shuffled":
        return
    if not torch.equal(data.train.labels, data.train.plain().labels):
        raise UserError(
            f"--loader.sampling must be shuffled for {options.run.data}, whose epochs draw samples "
            "of their own, but is balanced: leave it out, or take --loss.class-weights balanced"
        )


def _describe_step(options: Options, trainer: loop.Trainer) -> str:
    run, world = options.run, distributed.world()
    rate = f"learning rate {run.optimizer.learning_rate:g}"
    if run.optimizer.extractor_rate is not None:
        rate += f", of the extractors {run.optimizer.extractor_rate:g}"
    return (
        f"effective batch size {trainer.effective_batch_size}: {run.loader.batch_size} samples x "
        f"{world} {'process' if world == 1 else 'processes'} x {run.optimizer.accumulate} added "
        f"up; {rate}, which does not follow the batch size"
    )


def _resumed(options: Options) -> checkpoint.Last:
    """The state of last.pt or previous.pt, of a run with the same options."""
    last, previous = options.output / checkpoint.LAST, options.output / checkpoint.PREVIOUS
    if not last.exists() and not previous.exists():
        raise UserError(
            f"--resume found no checkpoint {last}: leave out --resume to start, or name the run's "
            "folder by --output"
        )
    state, path = found = checkpoint.load_last(options.output)
    # An option that the checkpoint's version did not have is at its default.
    before = parse_config(state["config"], f"the checkpoint {path}")
    saved, now = (result_relevant(chosen.config()) for chosen in (before, options))
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
    """Notes where the hardware is not the checkpoint's; every process has to call it."""
    now = distributed.gather(result.hardware(device))
    before = resumed.state.get("hardware", now)  # older versions do not write it
    if before != now and distributed.is_first():
        print(
            f"note: {resumed.path} was written on {', '.join(before)}, now it is "
            f"{', '.join(now)}: the last bits, and a GPU's draws for dropout, may differ from an "
            "uninterrupted run's",
            file=sys.stderr,
        )


def result_relevant(config: dict[str, Any]) -> dict[str, Any]:
    """The options that can change the result: all but the folder of the files, checkpoint_steps and
    workers, and of the device its kind alone."""
    kept = {key: config[key] for key in config if key not in ("root", "checkpoint_steps")}
    loader = {key: value for key, value in config["loader"].items() if key != "workers"}
    return {**kept, "device": config["device"].partition(":")[0], "loader": loader}


def check_data(
    saved: dict[str, Any], now: dict[str, Any], path: Path, also_samples: bool = True
) -> None:
    """Raises UserError where the data set `now` is not that of the checkpoint `path`; both are as
    `loop.identity` has them."""
    names = [name for name in saved if also_samples or name != "samples"]
    for name in names:
        if name == "moments":
            if _agree(saved[name], now[name]):
                continue
            raise UserError(
                f"the data set is not that of {path}: its training samples have another mean or "
                "standard deviation, by which --standardize brings all samples"
            )
        if saved[name] != now[name]:
            raise UserError(
                f"the data set is not that of {path}: {name} was {saved[name]}, is {now[name]}"
            )


def _agree(saved: Moments | None, now: Moments | None) -> bool:
    """Whether moments are those of the same samples: sums are rounded otherwise with another number
    of threads or on another processor."""
    if saved is None or now is None:
        return saved is now
    for name in now:
        before, after = (torch.tensor(x[name], dtype=torch.float64) for x in (saved, now))
        allowed = ROUNDING * after.abs().sum(0)
        if ((before - after).abs() > allowed).any():
            return False
    return True


def device_of(name: str) -> torch.device:
    """The device of that name, in this process; UserError where it cannot be used."""
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
