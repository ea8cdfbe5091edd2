from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmixer_kernels.training import checkpoint
from mmixer_kernels.training.command import UserError

STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(4096.0)},
    "history": [{"epoch": 1, "loss": 0.1 + 0.2, "none": None, "text": "x", "yes": True}],
}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["history"] == STATE["history"]
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    before = path.read_bytes()
    with pytest.raises(TypeError), checkpoint.replacing(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == before


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, part: float) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=r"last\.pt is damaged .*: restore it"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.arange(100.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.pt is not a file"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="is not a file"):
        checkpoint.load(tmp_path)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt has checkpoint format None"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"format": 1, "code": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt is damaged or is not a checkpoint"):
        checkpoint.load(tmp_path / "code.pt")
