"""The examples of the documentation's pages and of docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from markdown_blocks import blocks, run_python

import mmixer_kernels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "mmixer_kernels").rglob("*.py"))
    if ">>> " in path.read_text()
]
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if blocks(path, "python")]
SLOW = {"api/training.md"}


def page(path: Path) -> object:
    name = path.relative_to(DOCS).as_posix()
    return pytest.param(path, id=name, marks=pytest.mark.slow if name in SLOW else ())


def test_pages_with_python_are_found() -> None:
    assert {"backward", "engines", "network"} <= {path.stem for path in PAGES}


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_python_of_the_page_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which examples write to
    run_python(path)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    public = {name: getattr(mmixer_kernels, name) for name in mmixer_kernels.__all__}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, **public})
    assert result.attempted
    assert not result.failed
