"""Mixed precision: autocast around the network, and the scaled loss that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Around the network and its loss; `precision` as in `RunOptions`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss so that float16's gradients do not vanish; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
