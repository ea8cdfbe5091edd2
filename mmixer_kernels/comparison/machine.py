"""The machine that a case runs on, and the settings of this process that slow it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from ..engines import Engine, EngineState, chosen, engines, of_device
from .case import Case

BUSY = 0.5
"""The load per processor, before the measurement, from which on a warning is due."""
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "MMIXER_CUDA_PATHS": "the CUDA engine takes the paths that it names alone",
    "MMIXER_CUDA_SAMPLES": "the CUDA engine's teams have the samples that it names alone",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every result is allocated by the driver",
    "TRITON_INTERPRET": "Triton's kernels run in Python",
    "OMP_WAIT_POLICY": "threads that wait sleep where it is passive, and are slow to wake",
}
"""Environment variables that slow calls where they are set, and how."""
_OF_GPUS = ("CUDA", "TRITON")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def load() -> float | None:
    """The processes that wait for a processor, the mean of a minute; None where nobody knows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the processor's caches of data, "L1" to "L3", as Linux tells them; else empty."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)
    return found


def memories(device: torch.device) -> dict[str, int]:
    """Bytes of the memories between the products and the device's own, the nearest first."""
    if device.type == "cpu":
        return caches()
    properties = torch.cuda.get_device_properties(device)
    found = {}
    # ROCm's properties lack some of these.
    per_processor = getattr(properties, "shared_memory_per_multiprocessor", None)
    if per_processor:
        found["shared memory of all SMs"] = per_processor * properties.multi_processor_count
    if size := getattr(properties, "L2_cache_size", None):
        found["L2"] = size
    return found


def _engine(case: Case) -> Engine:
    return chosen(case.engine, torch.empty(0, **case.like))


def facts(case: Case) -> dict[str, Any]:
    """The engine that takes a case, why, and the way that it goes; and why no other engine does."""
    engine, asked = _engine(case), os.environ.get("MMIXER_ENGINE")
    if case.engine != "auto":
        why = "asked for by name"
    elif asked and asked != "auto":
        why = f"MMIXER_ENGINE={asked} asks for it"
    else:
        why = f"the first in auto's order that runs on {case.device.type}"
    others = {}
    order = [x.NAME for x in of_device(case.device)]
    for name, state in engines().items():
        if name == engine.NAME:
            continue
        if name not in order:
            others[name] = f"takes no tensors on {case.device.type}"
        elif not state.available:
            others[name] = f"off: {state.reason}"
        elif order.index(name) > order.index(engine.NAME):
            others[name] = "runs here, and is behind it in auto's order"
        else:
            others[name] = "runs here, and is before it in auto's order"
    path = getattr(engine, "path", None)
    ways = {}
    for backward, name in ((False, "forward"), (True, "backward")):
        ways[name] = path(case.problem, backward) if path else engine.state(case.device).reason
    return {"name": engine.NAME, "why": why, "ways": ways, "others": others}


def _before(case: Case) -> dict[str, EngineState]:
    """The engines of the device that stand before the case's own, with their states."""
    order = of_device(case.device)
    return {x.NAME: x.state(case.device) for x in order[: order.index(_engine(case))]}


def faster_engine(case: Case) -> str | None:
    """The name of an engine that runs here and stands before the case's own."""
    return next((name for name, state in _before(case).items() if state.available), None)


def threads_are_set_by() -> str:
    """Who has said how many threads torch has, as far as the number tells."""
    now = str(torch.get_num_threads())
    said = [f"{name}={now}" for name in _THREADS if os.environ.get(name) == now]
    return " and ".join(said) or "torch.set_num_threads, --threads, or torch itself"


def settings(case: Case) -> list[str]:
    """The settings of this process's environment and of this build that slow the case, a sentence
    each. What else might be faster is measured: see `alternatives`."""
    notes = [
        f'the engine "{name}", which auto prefers, is off: {state.reason}'
        for name, state in _before(case).items()
        if not state.available
    ]
    if case.device.type == "cpu":
        notes += _of_build()
    return notes + [
        f"{name}={os.environ[name]} is set: {why}"
        for name, why in SLOWING.items()
        if os.environ.get(name)
        and (case.device.type == "cuda" or not any(x in name for x in _OF_GPUS))
    ]


def _of_build() -> list[str]:
    """The ways in which the extension's build slows calls on a CPU."""
    try:
        build = importlib.import_module("mmixer_kernels._native").build_info()
    except ImportError:
        return []  # the engine is told to be off
    notes = []
    if not build["openmp"]:
        notes.append("the extension was built without OpenMP: its own threads are not torch's")
    if build["build_type"] == "Debug":
        notes.append("the extension was built for debugging, without optimisation")
    best = build["instruction_sets_here"][0]
    if build["instruction_set"] != best:
        notes.append(f"the extension uses {build['instruction_set']}, though {best} is there")
    return notes
