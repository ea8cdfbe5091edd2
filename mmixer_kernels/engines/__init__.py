"""The engines: implementations of one recurrence, and which of them a call gets."""

from __future__ import annotations

import os
import warnings
from typing import cast

import torch
from torch import Tensor

from ..arguments import check_choice
from . import cpu, cuda, reference, triton
from .protocol import Engine, EngineState, NativeEngine, Stream

__all__ = [
    "ENGINES",
    "Engine",
    "EngineState",
    "NativeEngine",
    "Stream",
    "check_name",
    "choose",
    "chosen",
    "engines",
    "get",
    "names",
    "native_of",
    "of_device",
]

ENGINES: tuple[Engine, ...] = (cpu, cuda, triton, reference)
"""The registry: of the engines of a device the fastest stands first, and the last takes any."""
_warned: set[str] = set()


def names() -> tuple[str, ...]:
    """The names of all engines."""
    return tuple(engine.NAME for engine in ENGINES)


def of_device(device: torch.device) -> list[Engine]:
    """The engines that take tensors on this device, the fastest first."""
    return [engine for engine in ENGINES if _takes(engine, device)]


def _takes(engine: Engine, device: torch.device) -> bool:
    return not engine.DEVICES or device.type in engine.DEVICES


def engines() -> dict[str, EngineState]:
    """Each engine's name, whether it can run here, and where it cannot, the reason."""
    return {engine.NAME: engine.state() for engine in ENGINES}


def check_name(name: object) -> None:
    """Raises ValueError when `name` is neither "auto" nor an engine."""
    check_choice("engine", name, ("auto", *names()))


def get(name: str) -> Engine:
    """The engine of this name; ValueError where there is none."""
    if isinstance(name, str):
        for engine in ENGINES:
            if name == engine.NAME:
                return engine
    check_name(name)
    raise ValueError(f"engine must be one of {', '.join(names())}, but is {name!r}")


def native_of(engine: Engine) -> NativeEngine | None:
    """The engine where it is a native one."""
    return cast(NativeEngine, engine) if hasattr(engine, "run_forward") else None


def choose(engine: str, input: Tensor) -> str:
    """The name of the engine that `chosen` returns."""
    return chosen(engine, input).NAME


def chosen(engine: str, input: Tensor) -> Engine:
    """The engine that a call with this input gets.

    An engine asked for by name is used, or raises: ValueError for an unknown name or for tensors
    that it does not take, RuntimeError where it cannot run. "auto" (after the environment variable
    MMIXER_ENGINE) takes the fastest engine of the input's device that runs here, and warns once
    where a faster one does not.
    """
    asked = "engine"
    if isinstance(engine, str) and engine == "auto":
        engine = os.environ.get("MMIXER_ENGINE") or "auto"
        if engine == "auto":
            return _fastest(input.device)
        asked = "MMIXER_ENGINE"
        check_choice(asked, engine, ("auto", *names()))
    found, device = get(engine), input.device
    if not _takes(found, device):
        raise ValueError(
            f'{asked}="{engine}" does not take this call: it takes tensors on '
            f"{', '.join(found.DEVICES)}, but input is on {device}"
        )
    state = found.state(device)
    if not state.available:
        raise RuntimeError(f'{asked}="{engine}" cannot run here: {state.reason}') from state.error
    return found


def _fastest(device: torch.device) -> Engine:
    """The first engine that takes tensors of this device and runs here: the reference does."""
    refused = []
    for engine in ENGINES:
        if not _takes(engine, device):
            continue
        state = engine.state(device)
        if state.available:
            break
        refused.append(f"{engine.NAME}: {state.reason}")
    # On AMD's GPUs there is no cuda engine to miss.
    if refused and not (engine.NAME == "triton" and torch.version.hip is not None):
        reasons = "; ".join(refused)
        _warn_once(f'falling back to engine="{engine.NAME}", as others do not run here: {reasons}')
    return engine


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
