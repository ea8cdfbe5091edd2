"""The structure of the package: floors of imports, parameter lists, and the prose of docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "mmixer_kernels"
FLOORS = (
    "version environment problem errors atomic stop command provenance",
    "autocast arguments unit reference",
    "engines",
    "dispatch batching derivatives flops onnx ops plain",
    "functional modules prepacked quantized stack streaming",
    "network",
    "data training",
    "trained experiments tuning comparison",
    "train evaluate predict extract export prepare info tune compare",
)
"""The rooms, from the ground up: a module may import from its own floor or from a lower one."""
MOST_PARAMETERS = 6
FRAGMENT = re.compile(r"(Of|What|By|As|Whose|From|With|To|For|In|On|At|Which|Where|When|If)\b")
"""Words that begin no whole sentence whose subject is what the docstring is about."""


def modules() -> dict[str, ast.Module]:
    """The package's modules by name, without the package's: "engines.cpu"; "" is its face."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that one imports, wherever in its text."""
    is_package = any(other.startswith(f"{name}.") for other in MODULES)
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".") if name else []
            base = parts[: len(parts) - node.level + is_package]
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            source = (node.module or "").removeprefix(PACKAGE).strip(".")
        else:
            continue
        for alias in node.names:
            module = f"{source}.{alias.name}".strip(".")
            yield module if module in MODULES else source


def floor(name: str) -> int:
    room = name.split(".")[0]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms.split())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_no_import_runs_back_up() -> None:
    for name in MODULES:
        for other in imports(name):
            if name and other:  # the face hands names on; what imports it imports the extension
                assert floor(other) <= floor(name), f"{name} imports {other}"


def test_imports_have_no_circle() -> None:
    graph = {name: set(imports(name)) - {name, ""} for name in MODULES if name}
    assert list(TopologicalSorter(graph).static_order())


def test_parameter_lists_of_ops_and_engines_are_short() -> None:
    for name, tree in MODULES.items():
        if name == "ops" or (name.startswith("engines") and "triton_kernels" not in name):
            for function in functions(tree):
                parameters = function.args.posonlyargs + function.args.args
                parameters += function.args.kwonlyargs
                names = [parameter.arg for parameter in parameters if parameter.arg != "self"]
                assert len(names) <= MOST_PARAMETERS, f"{name}.{function.name}: {names}"


def test_a_docstring_s_first_sentence_has_its_subject() -> None:
    wrong = []
    for folder in (PACKAGE, "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    docstring = ast.get_docstring(node) or ""
                    if FRAGMENT.match(docstring):
                        wrong.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
