from __future__ import annotations

from pathlib import Path

import pytest

from mmixer_kernels.errors import UserError
from mmixer_kernels.training import toml

TABLE = {
    "text": 'quo"te \\ back\nnew\ttab \x7f \x00 ü 手 \U0001f600',
    "empty": "",
    "yes": True,
    "no": False,
    "whole": -3,
    "small": 1e-05,
    "large": 1e22,
    "tenth": 0.1,
    "infinite": float("inf"),
    "words": ["rgb", "depth"],
    "numbers": [1, 2.5],
    "nothing": [],
    "model": {"hidden_size": 512, "inner": {"a": 1}},
    "last": {"b": 2},
}


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(toml.dumps(TABLE), encoding="utf-8")
    assert toml.read(path) == TABLE


def test_null_has_no_toml() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        toml.dumps({"a": None})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.toml"):
        toml.read(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = = 3")
    with pytest.raises(UserError, match=r"broken\.toml.*line 1"):
        toml.read(broken)
