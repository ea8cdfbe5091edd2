"""The origin of a result: the commit of the code and the processor."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the checkout that this package is used from, with "-dirty" where files differ
    from it, or "unknown" and why in an installed copy.

    The environment variable MMIXER_COMMIT gives it to a copy without git's own files.
    """
    if given := os.environ.get("MMIXER_COMMIT"):
        return given
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return "unknown: not a git checkout"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
    return answer.stdout.strip()


def processor() -> str:
    """The processor's model name as Linux gives it, or "unknown"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
