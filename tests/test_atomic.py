from __future__ import annotations

from pathlib import Path

import pytest

from mmixer_kernels.atomic import replacing


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"


def test_the_file_before_can_be_kept(tmp_path: Path) -> None:
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content in (b"first", b"second"):
        with replacing(path, previous) as file:
            file.write(content)
    assert (path.read_bytes(), previous.read_bytes()) == (b"second", b"first")
    assert sorted(tmp_path.iterdir()) == [path, previous]
