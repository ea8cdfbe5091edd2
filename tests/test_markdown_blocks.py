"""Blocks are found where they stand, and a wrong one does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_blocks import Block, blocks, run_python

PAGE = """Text.

```python
x = 1
```

```sh
echo ```
```

- In a list:

  ```python
  >>> x + 1
  2
  >>> y = 3
  ```

```
no language
```

```python
assert x + y == 4
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_have_their_lines_and_no_indentation(page: Path) -> None:
    assert blocks(page, "python") == [
        Block(4, "x = 1\n"),
        Block(14, ">>> x + 1\n2\n>>> y = 3\n"),
        Block(24, "assert x + y == 4\n"),
    ]
    assert blocks(page, "sh") == [Block(8, "echo ```\n")]
    assert blocks(page, "") == [Block(20, "no language\n")]


def test_python_runs_from_top_to_bottom(page: Path) -> None:
    namespace = run_python(page)
    assert (namespace["x"], namespace["y"]) == (1, 3)


@pytest.mark.parametrize(
    ("right", "wrong", "line"), [("4\n", "5\n", 24), ("2\n", "3\n", 14), ("y = 3", "y = z", 16)]
)
def test_what_is_wrong_is_told_with_its_line(page: Path, right: str, wrong: str, line: int) -> None:
    page.write_text(PAGE.replace(f"== {right}", f"== {wrong}").replace(right, wrong))
    with pytest.raises(AssertionError) as caught:
        run_python(page)
    told = [str(caught.value)] + [f"line {entry.lineno + 1}," for entry in caught.traceback]
    assert any(f"line {line}," in text for text in told), told
