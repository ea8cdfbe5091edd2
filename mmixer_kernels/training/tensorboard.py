"""TensorBoard's events of a training, where the extra `tensorboard` is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


class Events:
    """A context that writes each epoch's record as scalars; nothing without TensorBoard.

    Args:
        folder: where the files go; None to write nothing.
        done: epochs that are complete: TensorBoard drops what an earlier part of the training,
            killed before its checkpoint, wrote of later ones.
    """

    def __init__(self, folder: Path | None, done: int) -> None:
        self.writer: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=done + 1)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def epoch(self, record: dict[str, Any]) -> None:
        """Writes a record of metrics.jsonl."""
        if self.writer is None:
            return
        for key, value in record.items():
            if key != "epoch":
                group = "validation" if key.startswith("validation_") else "training"
                name = key.removeprefix("validation_")
                self.writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        self.writer.flush()
