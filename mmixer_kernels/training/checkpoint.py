"""Checkpoints: tensors and plain types, on the disk whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .command import UserError

FORMAT = 1


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes `path`'s place when it is complete and on the disk: after a crash
    `path` is the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _sync_folder(path.parent)


def save(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain types (dict, list, tuple, str, int, float, bool, None)."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint that training wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is damaged or is not a checkpoint ({reason}): restore it from a copy, or "
            "train again in another --output"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {found}, but this version reads {FORMAT}: use the "
            "version of mmixer_kernels that wrote it"
        )
    return state


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
