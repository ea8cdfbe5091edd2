"""What the commands share: mistakes of the user end in one line, bugs in a traceback."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right; the message says what and how."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around code that reads what the user gave: its ValueError, OSError and ImportError become
    UserError."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def require(command: str, *modules: str) -> None:
    """Raises UserError when one of the modules that `command` needs is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"{command} needs {', '.join(missing)}: pip install 'mmixer_kernels[train]'"
        )


def run(body: Callable[[], int]) -> int:
    """The exit code of a command: body's own, 2 after a UserError, 130 after Ctrl-C."""
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
