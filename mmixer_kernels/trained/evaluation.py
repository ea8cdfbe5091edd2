"""The evaluation of a checkpoint on a split of its data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..data import Split
from ..errors import UserError, user_errors
from ..training import distributed, loop, mixed_precision
from ..training.run import device_of
from . import missing, quantized, streams
from .restore import AS_TRAINED, Overrides, Restored, read, rebuild, tell_device


def evaluate(
    path: Path,
    split: str,
    overrides: Overrides = AS_TRAINED,
    with_streams: bool = False,
    with_missing: bool = False,
    with_quantized: bool = False,
) -> dict[str, Any]:
    """The report of a checkpoint's weights on a split.

    Args:
        path: the checkpoint.
        split: "validation" or "test".
        overrides: options that are not the run's.
        with_streams: adds "streams", the report of a classifier on each modality's state (Eq. 15),
            and writes the classifiers beside the checkpoint.
        with_missing: adds "missing", the numbers with a modality absent or noised, as
            `missing.evaluate` has them.
        with_quantized: adds "quantized", the numbers with int8 weights in the MCUs.

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together; or the
            network cannot be computed in the precision on the device.
    """
    state, options = read(path, overrides)
    if with_streams and not os.access(path.parent, os.W_OK):
        raise UserError(
            f"{path.parent} cannot be written, and the classifiers of the streams belong there: "
            "copy the checkpoint to a folder of your own"
        )
    place = device_of(options.run.device)
    with distributed.job(place):
        with distributed.fail_together():
            restored = rebuild(state, options, path, place)
            samples = restored.data.test if split == "test" else restored.data.validation
            mixed_precision.check(restored.model, samples, options.run)
        tell_device(restored)
        return _evaluate(restored, path, split, samples, with_streams, with_missing, with_quantized)


def _evaluate(
    restored: Restored,
    path: Path,
    split: str,
    samples: Split,
    with_streams: bool,
    with_missing: bool,
    with_quantized: bool,
) -> dict[str, Any]:
    data, recognizer = restored.data, restored.model
    loader, precision = restored.options.run.loader, restored.options.run.precision
    evaluation = loop.evaluate(recognizer, samples, len(data.classes), loader, precision)
    report = {
        "checkpoint": str(path),
        "split": split,
        "epoch": restored.epoch,
        "engine": restored.engine,
        "device": restored.options.run.device,
        "precision": precision,
        **evaluation.report(data.classes),
    }
    if with_streams:
        heads = streams.train_heads(recognizer, data, loader, precision)
        alone = streams.evaluate_streams(recognizer, heads, samples, loader, precision)
        report["streams"] = {
            modality: part.report(data.classes)
            for modality, part in zip(data.modalities, alone, strict=True)
        }
        with distributed.fail_together(), user_errors():
            if distributed.is_first():
                streams.save_heads(heads, recognizer, path)
    if with_missing:
        report["missing"] = missing.evaluate(
            recognizer, samples, data.modalities, len(data.classes), loader, precision
        )
    if with_quantized:
        report["quantized"] = quantized.evaluate(
            recognizer, samples, len(data.classes), loader, restored.options.run.device
        )
    return report
