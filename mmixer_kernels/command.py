"""The part that all commands share: exit codes, and the number of processors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .errors import DamagedFile, UserError


def run(body: Callable[[], int]) -> int:
    """The exit code of a command: the body's own, 2 after a UserError or a damaged file, 130 after
    Ctrl-C."""
    try:
        return body()
    except (UserError, DamagedFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def processors() -> int:
    """The number of processors that this process may use."""
    # macOS has no sched_getaffinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
