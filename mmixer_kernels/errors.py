"""Errors that a command reports to its user in one line; every other exception is a bug, and its
traceback is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A fault that the user can correct; the message says what it is and how."""


class DamagedFile(ValueError):
    """A file that cannot be read, or that has fewer frames than its header or its numbers say.

    Args:
        path: the file or folder.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        if reason:
            message = f"{path}: {reason}"
        else:
            # A DataLoader and pickle make the error again from a text: the message, or a worker's
            # traceback, which ends in it.
            message = str(path).rstrip().rpartition("DamagedFile: ")[2]
        super().__init__(message)


@contextmanager
def user_errors(*also: type[Exception]) -> Iterator[None]:
    """Turns ValueError, OSError, ImportError and the classes in `also` into UserError; it belongs
    around code that reads what the user gave."""
    try:
        yield
    except (ValueError, OSError, ImportError, *also) as error:  # type: ignore[misc]
        raise UserError(str(error)) from error
