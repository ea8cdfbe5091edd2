from __future__ import annotations

from pathlib import Path

import kill_and_resume
import pytest


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, world: int) -> None:
    """Three kills leave no trace; the command does 20."""
    kill_and_resume.check(tmp_path, world, kills=3, epochs=2, seed=0)
