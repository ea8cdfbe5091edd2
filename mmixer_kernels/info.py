"""`python -m mmixer_kernels.info`: what this installation is and can do."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .command import processors
from .engines import engines, names
from .environment import VARIABLES
from .training.result import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints `collect`'s answer as aligned text, or as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m mmixer_kernels.info",
        description="Prints versions, the build of the extension, engines, devices, threads and "
        "environment variables.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if chosen.json else _text(facts))
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Versions, the extension's build (or why it does not load), engines, devices, threads."""
    devices = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return {
        "versions": versions(),
        "extension": _extension(),
        "engines": {
            name: f"{'available' if state.available else 'off'}: {state.reason}"
            for name, state in engines().items()
        },
        "devices": devices,
        "threads": {
            "torch": torch.get_num_threads(),
            "torch between operations": torch.get_num_interop_threads(),
            "processors": processors(),
        },
        "environment": {variable.name: _value(variable.name) for variable in VARIABLES},
    }


def _extension() -> dict[str, Any]:
    try:
        native = importlib.import_module("mmixer_kernels._native")
    except ImportError as error:
        return {"error": f"mmixer_kernels._native cannot be loaded: {error}"}
    return dict(native.build_info())


def _value(variable: str) -> str:
    value = os.environ.get(variable, "not set")
    if variable == "MMIXER_ENGINE" and value not in ("not set", "", "auto", *names()):
        return f"{value}, which is none of auto, {', '.join(names())}"
    return value


def _text(facts: dict[str, dict[str, Any]]) -> str:
    width = max(len(key) for table in facts.values() for key in table)
    notes = {x.name: f" ({x.meaning.replace('`', '')}; read at {x.read})" for x in VARIABLES}
    sections = []
    for title, table in facts.items():
        lines = [f"  {key:<{width}}  {value}{notes.get(key, '')}" for key, value in table.items()]
        sections.append("\n".join([title, *lines]))
    return "\n\n".join(sections)


if __name__ == "__main__":
    sys.exit(main())
