"""Whether an engine can run on this machine."""

from __future__ import annotations

from typing import NamedTuple


class EngineState(NamedTuple):
    """Available or not; the reason in words; the error that the reason came from."""

    available: bool
    reason: str
    error: BaseException | None = None
