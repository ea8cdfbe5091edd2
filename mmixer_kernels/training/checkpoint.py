"""Checkpoints: tensors and plain types, on the disk whole or not at all.

A file is what `torch.save` writes, a ZIP archive, with the SHA-256 of it all as its comment.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..atomic import replacing
from ..errors import UserError
from . import distributed

FORMAT = 2
LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "damaged.pt"
COMMENT_LENGTH = 2
"""Bytes of the field with the length of a ZIP archive's comment, the last field of an archive
without one."""


class DamagedError(UserError):
    """A file that is not a whole checkpoint: the reason, and what to do where it is needed."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


def save(state: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Writes tensors and plain types (dict, list, tuple, str, int, float, bool, None); `previous`
    as in `replacing`."""
    with replacing(path, previous) as file:
        torch.save({"format": FORMAT, **state}, file)
        file.write(_comment(file, file.seek(-COMMENT_LENGTH, os.SEEK_END)))


def save_last(state: dict[str, Any], folder: Path) -> None:
    """Writes last.pt; the one before becomes previous.pt."""
    save(state, folder / LAST, folder / PREVIOUS)


class Last(NamedTuple):
    """The checkpoint to go on from, and which of a run's files it is."""

    state: dict[str, Any]
    path: Path


def load_last(folder: Path) -> Last:
    """The state of last.pt, or of previous.pt where last.pt is damaged or missing.

    A kill between two renames can leave previous.pt alone. A warning on stderr names a damaged
    last.pt; `set_damaged_aside` makes room before the next `save_last`.

    Raises:
        UserError: neither file can be read.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and previous.exists():
        return Last(load(previous), previous)
    try:
        return Last(load(last), last)
    except DamagedError as error:
        if not previous.exists():
            raise
        state = load(previous)
        if distributed.is_first():
            print(f"warning: {error.reason}; going on from {previous}", file=sys.stderr)
        return Last(state, previous)


def set_damaged_aside(found: Last) -> None:
    """Renames a last.pt that `load_last` did not take, so that it never replaces previous.pt."""
    last = found.path.with_name(LAST)
    if found.path != last and last.exists():
        os.replace(last, last.with_name(DAMAGED))


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, with tensors on the CPU.

    Raises:
        DamagedError: the file is damaged or not a checkpoint.
        UserError: it is missing or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint that training wrote")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        try:
            _check_comment(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes raise whatever the parser meets first
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DamagedError(
                f"{path} is damaged or is not a checkpoint ({reason})",
                "restore it from a copy, or train again in another --output",
            ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {found}, but this version reads {FORMAT}: use the "
            "version of mmixer_kernels that wrote it"
        )
    return state


def _comment(file: IO[bytes], size: int) -> bytes:
    """The end of an archive, which is a length and a text in ZIP, for the `size` bytes before it;
    leaves the file there."""
    file.seek(0)
    digest, left = hashlib.sha256(), size
    while part := file.read(min(left, 1 << 20)):
        digest.update(part)
        left -= len(part)
    text = digest.hexdigest().encode()
    return len(text).to_bytes(COMMENT_LENGTH, "little") + text


def _check_comment(file: IO[bytes]) -> None:
    text = 2 * hashlib.sha256().digest_size
    size = max(0, file.seek(0, os.SEEK_END) - COMMENT_LENGTH - text)
    comment = _comment(file, size)
    if file.read() != comment:
        raise ValueError("wrong checksum")
    file.seek(0)
