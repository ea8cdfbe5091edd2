"""Data sets: each a dataclass of options whose `load(root, seed)` gives a `Data`."""

from .arrays import ArraysOptions
from .base import Batch, Data, Sample, Split, collate
from .synthetic import SyntheticOptions
from .watch import WatchOptions

DATA: dict[str, type] = {
    "synthetic": SyntheticOptions,
    "watch": WatchOptions,
    "arrays": ArraysOptions,
}

__all__ = [
    "DATA",
    "ArraysOptions",
    "Batch",
    "Data",
    "Sample",
    "Split",
    "SyntheticOptions",
    "WatchOptions",
    "collate",
]
