"""The files that a training left in its folder, and the comparison of two trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmixer_kernels.training import checkpoint

TIMES = ("seconds", "samples_per_second", "data_wait")
"""The keys of a record that no two trainings have in common."""


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions; `result` is None before result.json is there."""
    last, best = (checkpoint.load(folder / name) for name in ("last.pt", "best.pt"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in (*records, *last["history"]):
        for name in TIMES:
            del record[name]
    result = folder / "result.json"
    text = result.read_text() if result.exists() else None
    return {"last": last, "best": best, "records": records, "result": text}


def unequal(a: Any, b: Any, name: str = "") -> list[str]:
    """The names of what is not the same to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [bad for key in a for bad in unequal(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        parts = enumerate(zip(a, b, strict=True))
        return [bad for i, (x, y) in parts for bad in unequal(x, y, f"{name}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if type(a) is type(b) and a == b else [name]
