"""What the commands share: mistakes of the user end in one line, bugs in a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..data import DamagedFile


class UserError(Exception):
    """Something the user can put right; the message says what and how."""


@contextmanager
def user_errors(*also: type[Exception]) -> Iterator[None]:
    """Around code that reads what the user gave: its ValueError, OSError and ImportError, and what
    `also` names, become UserError."""
    try:
        yield
    except (ValueError, OSError, ImportError, *also) as error:  # type: ignore[misc]
        raise UserError(str(error)) from error


def run(body: Callable[[], int]) -> int:
    """The exit code of a command: body's own, 2 after a UserError or a damaged file, 130 after
    Ctrl-C."""
    try:
        return body()
    except (UserError, DamagedFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
