"""The Python blocks of the documentation's pages do what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_blocks import blocks, run_python

DOCS = Path(__file__).parent.parent / "docs"
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
