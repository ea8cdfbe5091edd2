"""Checkpoints: tensors and plain types, on the disk whole or not at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..files import replacing
from .command import UserError

FORMAT = 1


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
