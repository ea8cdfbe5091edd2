"""The engines: implementations of one recurrence, and which of them a call gets.

An engine is a module with `state(device=None)` (can it run here, on that device if it is one of the
engine's, and if not why), `unsupported(...)` (why it does not take these tensors, or None),
`saved_size(...)`, `forward(...)` and `backward(...)`; where a single step without gradients has a
shorter way, also with `step(...)`.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import check_choice
from . import cpu, cuda, reference, triton
from .state import EngineState

_MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
}
NAMES = tuple(_MODULES)
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""The engines of a type of device, the fastest first."""
_warned: set[str] = set()


def engines() -> dict[str, EngineState]:
    """Each engine's name, whether it can run here, and where it cannot, the reason."""
    return {name: _state(name) for name in NAMES}


def check_name(name: str) -> None:
    """Raises ValueError when `name` is neither "auto" nor an engine."""
    check_choice("engine", name, ("auto", *NAMES))


def get(name: str) -> ModuleType:
    """The module of an available engine."""
    return _MODULES[name]


def choose(engine: str, input: Tensor) -> str:
    """The engine that a call with this input gets.

    An engine asked for by name is used, or raises: ValueError for an unknown name or for tensors
    that it does not take, RuntimeError where it cannot run. "auto" (after the environment variable
    MMIXER_ENGINE) takes the fastest engine of the input's device that runs here, and warns once
    where a faster one does not.
    """
    if isinstance(engine, str) and engine == "auto":
        engine = _from_environment()
    if not isinstance(engine, str) or engine != "auto":
        check_name(engine)
        if reason := get(engine).unsupported(input):
            raise ValueError(f'engine="{engine}" does not take this call: {reason}')
        state = _state(engine, input.device)
        if not state.available:
            raise RuntimeError(
                f'engine="{engine}" cannot run here: {state.reason}'
            ) from state.error
        return engine
    reasons = []
    chosen = "reference"
    for native in _OF_DEVICE.get(input.device.type, ()):
        reason = get(native).unsupported(input)
        if reason is None:
            state = _state(native, input.device)
            if state.available:
                chosen = native
                break
            reason = state.reason
        reasons.append(f"{native}: {reason}")
    # On AMD's GPUs there is no cuda engine to miss.
    if reasons and not (chosen == "triton" and torch.version.hip is not None):
        reason = "; ".join(reasons)
        _warn_once(f'falling back to engine="{chosen}", which is slower: {reason}')
    return chosen


def _state(name: str, device: torch.device | None = None) -> EngineState:
    state: EngineState = get(name).state(device)
    return state


def _from_environment() -> str:
    return os.environ.get("MMIXER_ENGINE") or "auto"


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
