"""Every class's probability for every sample and stream, as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..atomic import replacing
from ..errors import UserError
from .predictions import Prediction

FIRST = ("sample", "label", "stream", "predicted")
"""The columns before those of the classes."""


@contextmanager
def writing(path: Path, classes: Sequence[str]) -> Iterator[Callable[[Prediction], None]]:
    """Gives a function that adds a prediction to a CSV file, which takes `path`'s place when all
    are added.

    There is a row per sample and stream, so that the columns are the same with streams and without,
    and `pandas.read_csv(path).groupby("stream")` has them apart. The columns are those of FIRST and
    one per class: `label` and `predicted` are names of such columns, `label` empty where it is not
    known. The numbers are float64 with all their digits, and sum up to 1 in a row.

    Raises:
        UserError: the file cannot be written, or what is done meanwhile cannot be read.
    """
    names = columns(classes)
    try:
        with replacing(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            table = csv.writer(text, lineterminator="\n")
            table.writerow([*FIRST, *names])

            def add(prediction: Prediction) -> None:
                label = "" if prediction.label is None else names[prediction.label]
                predicted = prediction.predicted
                for stream, confidences in prediction.confidences.items():
                    first = (prediction.name, label, stream, names[predicted[stream]])
                    table.writerow([*first, *confidences.tolist()])

            yield add
            text.detach()  # flushes; `replacing` closes the file
    except OSError as error:
        raise UserError(str(error)) from error


def columns(classes: Sequence[str]) -> list[str]:
    """A column's name per class: the class's own, but with its number where it is empty or there
    already."""
    taken = ["", *FIRST]
    for number, name in enumerate(classes):
        column = name
        while column in taken:
            column = f"{column} (class {number})".strip()
        taken.append(column)
    return taken[1 + len(FIRST) :]
