"""The fenced blocks of a Markdown file, and a run of its Python.

The module is not called `markdown`, since tests/ comes first on the path of imports, and
TensorBoard and MkDocs import the package of that name.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the number of its first line of text in the file, from 1 on, and its text,
    without the fence's indentation."""

    line: int
    text: str


def blocks(path: Path, language: str) -> list[Block]:
    """The blocks of a language ("" for those that name none), in the file's order."""
    return blocks_of(path.read_text(), language)


def blocks_of(page: str, language: str) -> list[Block]:
    """`blocks` of a page's text."""
    found = []
    for match in FENCE.finditer(page):
        indent, named, text = match.groups()
        if named == language:
            lines = [line.removeprefix(indent) for line in text.splitlines(keepends=True)]
            found.append(Block(page.count("\n", 0, match.start(3)) + 1, "".join(lines)))
    return found


def run_python(path: Path) -> dict[str, Any]:
    """Runs a file's ```python blocks from top to bottom in one namespace, which is returned: a
    block that begins with ">>>" as a doctest, any other as it stands. A traceback has the lines of
    the file.

    Raises:
        AssertionError: an example of a doctest printed something else, or raised.
    """
    namespace: dict[str, Any] = {"__name__": path.stem}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for line, text in blocks(path, "python"):
        if not text.startswith(">>>"):
            exec(compile("\n" * (line - 1) + text, str(path), "exec"), namespace)
            continue
        parser = doctest.DocTestParser()
        test = parser.get_doctest(text, namespace, path.name, str(path), line - 1)
        report: list[str] = []
        result = runner.run(test, out=report.append, clear_globs=False)
        namespace = test.globs
        assert not result.failed, "".join(report)
    return namespace
