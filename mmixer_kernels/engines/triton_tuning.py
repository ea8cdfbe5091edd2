"""The tiles of the triton engine's kernels with products: those that
`python -m mmixer_kernels.tune` measured on this GPU and kept on disk, else a fixed default. Nothing
is ever tuned in a training.

Another tile adds in another order: results differ in their last bits before and after tuning.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic import replacing


class Configuration(NamedTuple):
    """A kernel's tile, and how it is run."""

    BLOCK_N: int  # columns
    BLOCK_K: int  # of a product's sum, at once
    num_warps: int
    num_stages: int


_DEFAULT = {
    2: Configuration(128, 64, 8, 3),
    4: Configuration(128, 32, 8, 3),
    8: Configuration(64, 16, 8, 2),
}
"""The defaults by an operand's bytes; no spill for 8.0, 9.0 and gfx942 (tests/engines)."""
_CANDIDATES = {
    2: [(128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 3), (128, 32, 4, 4), (64, 64, 4, 4)],
    4: [(128, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 2), (128, 16, 8, 3)],
    8: [(32, 16, 4, 2), (64, 16, 4, 2), (32, 32, 4, 2)],
}
_forced: Configuration | None = None


def configuration(hidden: int, dtype: torch.dtype, device: torch.device) -> Configuration:
    """The configuration that a kernel for this hidden size runs with."""
    if _forced is not None:
        return _forced
    tuned = _kept(path()).get(_key(hidden, dtype, device))
    return default(dtype) if tuned is None else Configuration(*tuned)


def default(dtype: torch.dtype) -> Configuration:
    """The configuration of a size that was not tuned."""
    return _DEFAULT[dtype.itemsize]


def candidates(dtype: torch.dtype) -> list[Configuration]:
    """All that tuning tries, the default first."""
    others = _CANDIDATES[dtype.itemsize]
    return [default(dtype), *(Configuration(*candidate) for candidate in others)]


@contextmanager
def forced(configuration: Configuration) -> Iterator[None]:
    """A context in which every kernel runs with this configuration."""
    global _forced
    before, _forced = _forced, configuration
    try:
        yield
    finally:
        _forced = before


class Trial(NamedTuple):
    """A configuration that was tried, and its time or why it has none."""

    configuration: Configuration
    seconds: float | None
    reason: str | None  # why it cannot be used


def tune(
    hidden: int, dtype: torch.dtype, device: torch.device, measure: Callable[[], float]
) -> list[Trial]:
    """Measures every candidate and keeps the fastest on disk for this size, dtype and device.

    Args:
        measure: the seconds of what is to be fast; raises where a candidate cannot run or is wrong.

    Returns:
        The trials, the fastest first, those that cannot be used last.

    Raises:
        RuntimeError: no candidate could be used.
        OSError: the file cannot be written.
    """
    trials = []
    for candidate in candidates(dtype):
        try:
            with forced(candidate):
                trials.append(Trial(candidate, measure(), None))
        except Exception as error:  # what Triton raises has no base class of its own
            trials.append(Trial(candidate, None, str(error) or type(error).__name__))
    trials.sort(key=lambda trial: float("inf") if trial.seconds is None else trial.seconds)
    best = trials[0]
    if best.seconds is None:
        raise RuntimeError(f"no configuration could be used; the first failed: {best.reason}")
    kept = {**_kept(path()), _key(hidden, dtype, device): list(best.configuration)}
    path().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path()) as file:
        file.write((json.dumps(kept, indent=2) + "\n").encode())
    _kept.cache_clear()
    return trials


def path() -> Path:
    """The file in which tuned configurations are kept."""
    folder = os.environ.get("MMIXER_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "mmixer_kernels")
    return Path(folder) / "triton.json"


@functools.cache
def _kept(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(path.read_bytes())
        for value in kept.values():
            Configuration(*map(int, value))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        message = f"{path} cannot be read, so kernels run with their defaults: {error}"
        warnings.warn(f"{message}; delete it or tune again", RuntimeWarning, stacklevel=2)
        return {}
    return kept


@functools.cache
def _key(hidden: int, dtype: torch.dtype, device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}, {str(dtype).removeprefix('torch.')}, H = {hidden}"
