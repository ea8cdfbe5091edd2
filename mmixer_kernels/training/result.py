"""The report of a run: versions, and the numbers of an evaluation."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines import choose
from ..version import __version__
from . import metrics
from .options import ModelOptions, Options


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


def describe_device(options: Options, device: torch.device, engine: str | None) -> str:
    """The device, its hardware and what computes there, in a line; `engine` as `engine_used` has
    it."""
    parts = ["auto"] if options.device_is_automatic else []
    if device.type == "cpu":
        threads = torch.get_num_threads()
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
        parts.append(torch.backends.cpu.get_cpu_capability())
    elif device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    name = f"device {options.run.device}" + (f" ({', '.join(parts)})" if parts else "")
    unit = options.run.model.unit
    computes = f"PyTorch's {unit}" if engine is None else f"engine {engine}"
    return f"{name}, {computes}, {options.run.precision}"


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
    return "\n".join([*lines, headline(split, torch.tensor(report["confusion"]))])


def headline(split: str, confusion: Tensor) -> str:
    """The numbers of a confusion matrix `[K, K]` in a line."""
    return (
        f"{split}: accuracy {metrics.accuracy(confusion):.2%}, mean class accuracy "
        f"{metrics.mean_class_accuracy(confusion):.2%}, {int(confusion.sum())} samples"
    )


def stream_line(modality: str, accuracy: float) -> str:
    """The accuracy of a stream's own classifier in a line."""
    return f"{modality} stream alone: accuracy {accuracy:.2%}"
