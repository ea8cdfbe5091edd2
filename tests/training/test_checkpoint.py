from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmixer_kernels.errors import UserError
from mmixer_kernels.training import checkpoint

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
    with pytest.raises(UserError, match=r"other\.pt is damaged or is not a checkpoint"):
        checkpoint.load(tmp_path / "other.pt")
    checkpoint.save({"format": 1}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"old\.pt has checkpoint format 1, but .* reads 2"):
        checkpoint.load(tmp_path / "old.pt")
    checkpoint.save({"code": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt is damaged or is not a checkpoint"):
        checkpoint.load(tmp_path / "code.pt")


def state_of(step: int) -> dict[str, Any]:
    return {**STATE, "step": step}


def test_the_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save_last(state_of(step), tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    assert checkpoint.load_last(tmp_path).path == tmp_path / "last.pt"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_at_a_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, rename: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoint.save_last(state_of(step), tmp_path)
    replace = os.replace
    renames = 0

    def killed(*paths: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == rename:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_last(state_of(3), tmp_path)
    found = checkpoint.load_last(tmp_path)
    assert found.state["step"] == 2
    assert found.path.name == ("last.pt" if rename == 1 else "previous.pt")


def test_a_damaged_last_is_named_and_never_replaces_the_previous(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint.save_last(state_of(step), tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    found = checkpoint.load_last(tmp_path)
    assert (found.state["step"], found.path.name) == (1, "previous.pt")
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {last} is damaged")
    assert warning.endswith(f"; going on from {tmp_path / 'previous.pt'}\n")
    checkpoint.set_damaged_aside(found)
    checkpoint.save_last(state_of(3), tmp_path)
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt", "damaged.pt"}


def test_with_both_damaged_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.pt is damaged"):
        checkpoint.load_last(tmp_path)


def test_any_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"weight": torch.arange(8.0)}, path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(path)


def test_torch_reads_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    assert torch.equal(torch.load(path)["model"]["weight"], STATE["model"]["weight"])
