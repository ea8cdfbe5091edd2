"""Atomic writes: a file is on the disk whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Gives a file to write that takes `path`'s place once it is complete and on the disk: after a
    crash `path` is the old file or the new one, never a part.

    Args:
        previous: path under which the old file is kept. Between the two renames `path` is missing,
            but `previous` is whole.
    """
    beside = path.with_name(path.name + ".part")
    with open(beside, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    if previous is not None and path.exists():
        os.replace(path, previous)
        _sync_folder(path.parent)
    os.replace(beside, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
