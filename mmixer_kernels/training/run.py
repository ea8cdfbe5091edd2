"""A run from its folder to its result, and the evaluation of what it left there."""

from __future__ import annotations

import json
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data import Data
from ..data import check as preflight
from ..data.video import VideoOptions
from . import checkpoint, loop, model, plots, result, streams, toml
from .command import UserError, user_errors
from .options import Options, differences, parse_config

PRODUCTS = ("last.pt", "best.pt", "result.json")


def train(options: Options) -> dict[str, Any]:
    """Trains, tests the selected epoch once and writes everything in the run's folder.

    Returns:
        The contents of result.json.

    Raises:
        UserError: what the user asked for cannot be done.
        loop.Interrupted: a signal stopped the training; last.pt has the position, if a step was
            taken.
    """
    output = options.output
    state = _resumed(options) if options.run.resume else None
    if state is None:
        _refuse_overwriting(output)
    torch.manual_seed(options.run.seed)
    data, recognizer, engine = _build(options)
    trainer = loop.Trainer(options, data, recognizer)
    if state is not None:
        _check_data(state["data"], loop.identity(data), output / "last.pt")
        trainer.load_state(state)
    with user_errors():
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.toml").write_text(toml.dumps(options.config()), encoding="utf-8")
    with loop.Stop() as stop:
        trainer.fit(output, stop)

    selected = f"{options.run.select}.pt"
    recognizer.load_state_dict(checkpoint.load(output / selected)["model"])
    record = trainer.best() if options.run.select == "best" else trainer.history[-1]
    test = loop.evaluate(recognizer, data.test, len(data.classes), options.run.loader)
    report = {
        **test.report(data.classes),
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
        "threads": torch.get_num_threads(),
        "versions": result.versions(),
        "config": options.config(),
    }
    with checkpoint.replacing(output / "result.json") as file:
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
) -> dict[str, Any]:
    """The report of a checkpoint's weights on a split.

    Args:
        split: "validation" or "test".
        root: folder of the data set's files where it is not the run's.
        batch_size, workers: the run's when None.
        with_streams: adds "streams", the report of a classifier on each modality's state (Eq. 15).

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together.
    """
    state = checkpoint.load(path)
    options = parse_config(state["config"], f"the checkpoint {path}")
    loader = {"batch_size": batch_size, "workers": workers}
    given = {name: value for name, value in loader.items() if value is not None}
    with user_errors():
        changed = replace(options.run.loader, **given)
    run = replace(options.run, loader=changed, root=options.run.root if root is None else root)
    options = replace(options, run=run)
    data, recognizer, engine = _build(options)
    _check_data(state["data"], loop.identity(data), path, also_samples=False)
    recognizer.load_state_dict(state["model"])
    samples = data.test if split == "test" else data.validation
    evaluation = loop.evaluate(recognizer, samples, len(data.classes), options.run.loader)
    report = {
        "checkpoint": str(path),
        "split": split,
        "epoch": state["epoch"],
        "engine": engine,
        **evaluation.report(data.classes),
    }
    if with_streams:
        alone = streams.evaluate_streams(recognizer, data, samples, options.run.loader)
        report["streams"] = {
            modality: part.report(data.classes)
            for modality, part in zip(data.modalities, alone, strict=True)
        }
    return report


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


def _build(options: Options) -> tuple[Data, model.Recognizer, str | None]:
    """The data set, the network on its device, and the engine that computes it."""
    with user_errors():
        device = _device(options.run.device)
        data = options.load_data()
        recognizer = model.build(options.run.model, data).to(device)
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


def _resumed(options: Options) -> dict[str, Any]:
    """The state of last.pt, of a run with the same options."""
    path = options.output / "last.pt"
    if not path.exists():
        raise UserError(
            f"--resume found no checkpoint {path}: leave out --resume to start, or name the run's "
            "folder by --output"
        )
    state = checkpoint.load(path)
    saved, now = (_decisive(config) for config in (state["config"], options.config()))
    if now["optimizer"]["schedule"] == "constant" and now["epochs"] >= saved["epochs"]:
        # With a constant rate a longer run begins with the very steps of a shorter one.
        saved["epochs"] = now["epochs"]
    changed = differences(saved, now)
    if changed:
        raise UserError(
            f"--resume needs the options of {path}, but {'; '.join(changed)} (only the epochs of "
            "a constant schedule can grow): start another run by --output"
        )
    if state["threads"] != torch.get_num_threads():
        print(
            f"note: {path} was written with {state['threads']} threads, now there are "
            f"{torch.get_num_threads()}: the last bits may differ from an uninterrupted run's",
            file=sys.stderr,
        )
    return state


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no result."""
    kept = {key: value for key, value in config.items() if key != "root"}
    loader = {key: value for key, value in config["loader"].items() if key != "workers"}
    return {**kept, "loader": loader}


def _check_data(
    saved: dict[str, Any], now: dict[str, Any], path: Path, also_samples: bool = True
) -> None:
    names = [name for name in saved if also_samples or name != "samples"]
    for name in names:
        if saved[name] != now[name]:
            raise UserError(
                f"the data set is not that of {path}: {name} was {saved[name]}, is {now[name]}"
            )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device
