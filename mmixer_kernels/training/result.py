"""The report of a run: versions, and the numbers of an evaluation."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines import choose
from ..version import __version__
from . import metrics
from .options import ModelOptions


class Evaluation(NamedTuple):
    """A pass over a split: `confusion [K, K]` int64, rows true; `loss`, the mean cross-entropy."""

    confusion: Tensor
    loss: float

    def summary(self) -> dict[str, float]:
        """Accuracy, mean accuracy of the classes, and loss."""
        return {
            "accuracy": metrics.accuracy(self.confusion),
            "mean_class_accuracy": metrics.mean_class_accuracy(self.confusion),
            "loss": self.loss,
        }

    def report(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """All numbers in plain types; `per_class_accuracy` and `confusion` in order of classes."""
        return {
            **self.summary(),
            "samples": int(self.confusion.sum()),
            "classes": list(classes),
            "per_class_accuracy": metrics.per_class_accuracy(self.confusion),
            "confusion": self.confusion.tolist(),
        }


def versions() -> dict[str, str]:
    """The versions of the packages that decide a result, and the platform."""
    import numpy

    return {
        "mmixer_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def hardware(device: torch.device) -> str:
    """The name of the hardware behind a device; equal calls may differ in their last bits between
    two of them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"a CPU with {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def engine_used(options: ModelOptions, device: torch.device) -> str | None:
    """The engine that computes the MCUs on a device; None for units that are PyTorch's own."""
    return choose(options.engine, torch.empty(0, device=device)) if options.unit == "mcu" else None


def describe(report: dict[str, Any], split: str) -> str:
    """An evaluation's report as text."""
    names = [str(name) for name in report["classes"]]
    width = max(map(len, names))
    lines = [
        f"{name:<{width}}  {'no samples' if value is None else f'{value:8.2%}'}"
        for name, value in zip(names, report["per_class_accuracy"], strict=True)
    ]
    lines.append(
        f"{split}: accuracy {report['accuracy']:.2%}, mean class accuracy "
        f"{report['mean_class_accuracy']:.2%}, {report['samples']} samples"
    )
    return "\n".join(lines)
