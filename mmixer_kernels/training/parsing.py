"""Parsing: the command line and TOML files fill the options of a training run.

Precedence: general defaults < the data set's recipe < configuration file < command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..data import DATA
from ..errors import UserError
from . import toml
from .options import (
    DEFAULT_DATA,
    NOT_IN_FILES,
    DataOptions,
    ExtractOptions,
    ExtractorOptions,
    LoaderOptions,
    Options,
    RunOptions,
    default_output,
)


def parse(arguments: Sequence[str], prog: str) -> Options:
    """The options of the command line and of the configuration file that it names.

    Raises:
        UserError: an unreadable file or an unknown key in it, naming both; a wrong value.
        SystemExit: an option that is unknown or has a wrong value (after saying so), or --help.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for option in ("--data", "--config", "--output", "--seed"):
        first.add_argument(option)
    first.add_argument("--resume", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    config = _config_path(chosen.config) if chosen.config else None
    if config is None and chosen.resume:
        folder = default_output(chosen.data or DEFAULT_DATA, chosen.seed or "0")
        written = Path(chosen.output or folder) / "config.toml"
        config = written if written.is_file() else None
    table = toml.read(config) if config is not None else {}
    source = f"the configuration {config}"
    name = chosen.data or table.get("data", DEFAULT_DATA)
    if name not in DATA:
        place = "--data" if chosen.data else f"data in {source}"
        raise UserError(f"{place} must be one of {', '.join(DATA)}, but is {name!r}")
    defaults = _defaults(name)
    if table:
        defaults = _parse_table({**table, "data": name}, defaults, source)
    description = (
        f"Trains an M-Mixer and tests it on unseen samples. --data is one of {', '.join(DATA)}; "
        f"shown here are the options and the defaults of {name}."
    )
    return _parse(arguments, defaults, prog, description).with_device()


def parse_extract(arguments: Sequence[str], prog: str) -> Options:
    """The options for a data set's features before any training; `run.output` is their folder.

    Raises:
        UserError: an unknown data set or a wrong value.
        SystemExit: as in `parse`.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--data")
    name = first.parse_known_args(arguments)[0].data
    if name not in DATA:
        raise UserError(f"--data must be one of {', '.join(DATA)}, but is {name!r}")
    defaults = _defaults(name)
    model, loader = defaults.run.model, defaults.run.loader
    own = ExtractOptions(
        data=name,
        model=ExtractorOptions(model.extractor, model.weights),
        loader=LoaderOptions(loader.batch_size, loader.workers),
    )
    description = f"Writes features of {name} as arrays, by networks that have not seen it."
    own, data = _compose(arguments, own, defaults.data, prog, description)
    run = dataclasses.replace(
        defaults.run,
        root=own.root,
        output=own.output or Path("features") / name,
        seed=own.seed,
        device=own.device,
        loader=dataclasses.replace(loader, **dataclasses.asdict(own.loader)),
        model=dataclasses.replace(model, extractor=own.model.extractor, weights=own.model.weights),
    )
    return Options(run, data).with_device()


def parse_config(config: dict[str, Any], source: str) -> Options:
    """The options that `Options.config` gave; UserError as in `parse`, naming `source`."""
    if config.get("data") not in DATA:
        raise UserError(
            f"data in {source} must be one of {', '.join(DATA)}, but is {config.get('data')!r}"
        )
    return _parse_table(config, _defaults(config["data"]), source).with_device()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options that differ between two `Options.config`, each with both values."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{_flag(key)} was {before.get(key)}, is {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def recipes() -> dict[str, Path]:
    """The package's recipes by name."""
    folder = Path(__file__).parent.with_name("recipes")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _config_path(name: str) -> Path:
    """The file of that name, or else the package's recipe."""
    path = Path(name)
    if path.is_file():
        return path
    if name not in recipes():
        raise UserError(
            f"--config {name} is neither a file nor a recipe of the package "
            f"({', '.join(recipes())})"
        )
    return recipes()[name]


def _defaults(name: str) -> Options:
    """The general defaults under the recipe of a data set."""
    run = RunOptions(data=name)
    for key, value in DATA[name].recipe.items():  # type: ignore[attr-defined]
        group, _, leaf = key.rpartition(".")
        if group:
            run = dataclasses.replace(
                run, **{group: dataclasses.replace(getattr(run, group), **{leaf: value})}
            )
        else:
            run = dataclasses.replace(run, **{leaf: value})
    return Options(run, DATA[name]())


def _parse(arguments: Sequence[str], defaults: Options, prog: str, description: str) -> Options:
    return Options(*_compose(arguments, defaults.run, defaults.data, prog, description))


def _compose(
    arguments: Sequence[str], first: Any, data: DataOptions, prog: str, description: str
) -> tuple[Any, Any]:
    """A command's own options and the data set's, side by side, from the command line."""
    import tyro

    flat = tyro.conf.arg(name="")
    command = dataclasses.make_dataclass(
        "Command",
        [("first", Annotated[type(first), flat]), ("data", Annotated[type(data), flat])],
    )
    try:
        parsed: Any = tyro.cli(
            command,
            prog=prog,
            description=description,
            args=list(arguments),
            default=command(first, data),
        )
    except ValueError as error:  # tyro reports only those of the groups
        raise UserError(str(error)) from error
    return parsed.first, parsed.data


def _parse_table(table: dict[str, Any], defaults: Options, source: str) -> Options:
    known = [key for key, _ in _leaves(_fields(defaults))]
    arguments: list[str] = []
    for key, value in _leaves(table):
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; perhaps {close[0]}" if close else ""
            raise UserError(
                f"{source} has an unknown key, {key}{hint} (keys for data = "
                f'"{defaults.run.data}": {", ".join(known)})'
            )
        arguments += _arguments(key, value)
    try:
        return _parse(arguments, defaults, "python -m mmixer_kernels.train", "")
    except UserError as error:
        raise UserError(f"{error}, in {source}") from error
    except SystemExit:
        print(f"error: the value above is in {source}", file=sys.stderr)
        raise


def _fields(options: Options) -> dict[str, Any]:
    run = dataclasses.asdict(options.run)
    for name in set(NOT_IN_FILES) - {"output"}:
        del run[name]
    return {**run, **dataclasses.asdict(options.data)}  # type: ignore[call-overload]


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, dot, leaf = key.rpartition(".")
        return [_flag(key) if value else _flag(f"{group}{dot}no_{leaf}")]
    values = value if isinstance(value, list) else [value]
    return [_flag(key), *map(str, values)]


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
