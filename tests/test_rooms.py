"""The package's modules stand on floors: one imports from its own floor or a lower one, and there
is no circle. The extension, which has no floor, is left out."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import mmixer_kernels

PACKAGE = Path(mmixer_kernels.__file__).parent
FLOORS = (
    {"version", "problem", "errors", "atomic", "stop", "command", "provenance"},
    {"arguments", "reference"},
    {"engines"},
    {"ops"},
    {"functional", "modules", "streaming"},
    {"network"},
    {"data", "training"},
    {"trained", "experiments"},
    {"__init__", "train", "evaluate", "extract", "export", "prepare", "predict", "info", "tune"},
)
"""Rooms from the ground up; one that is not named here must stand in no circle."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports from it, by dotted names."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {name.removesuffix(".__init__"): set() for name in modules}
    for name, path in modules.items():
        folders = path.relative_to(PACKAGE).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            start = folders[: len(folders) - node.level + 1]
            origin = [*start, *(node.module or "").split(".")] if node.module else list(start)
            for alias in node.names:
                whole = ".".join([*origin, alias.name])
                target = whole if whole in found else ".".join(origin) or "__init__"
                if whole != "_native":
                    found[name.removesuffix(".__init__")].add(target)
    return found


def test_no_module_imports_from_a_higher_floor() -> None:
    rooms = [
        (name, target, *(FLOOR.get(x.partition(".")[0]) for x in (name, target)))
        for name, targets in imports().items()
        for target in targets
    ]
    assert len(rooms) > 100
    assert [
        f"{name} imports {target}"
        for name, target, own, other in rooms
        if own is not None and other is not None and other > own
    ] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(imports()).prepare()
