"""Where a result comes from: the commit of the code and the processor."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the checkout that this package is used from, with "-dirty" where files differ
    from it; of an installed copy, "unknown" and why.

    A copy without git's own files has it in the environment variable MMIXER_COMMIT.
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
    """The model name that Linux gives, or "unknown"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
