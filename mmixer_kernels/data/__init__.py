"""Data sets: each a dataclass of options whose `load(root, seed)` gives a `Data`."""

from ..errors import DamagedFile
from .arrays import ArraysOptions
from .base import Batch, Data, Sample, Split, collate
from .ntu import Ntu60Options, Ntu120Options
from .nw_ucla import NwUclaOptions
from .recordings import ClipsOptions
from .synthetic import SyntheticOptions
from .watch import WatchOptions

DATA: dict[str, type] = {
    "synthetic": SyntheticOptions,
    "watch": WatchOptions,
    "arrays": ArraysOptions,
    "clips": ClipsOptions,
    "ntu60": Ntu60Options,
    "ntu120": Ntu120Options,
    "nw-ucla": NwUclaOptions,
}
"""The options of each data set, by the name that `--data` takes."""

__all__ = [
    "DATA",
    "ArraysOptions",
    "Batch",
    "ClipsOptions",
    "DamagedFile",
    "Data",
    "Ntu60Options",
    "Ntu120Options",
    "NwUclaOptions",
    "Sample",
    "Split",
    "SyntheticOptions",
    "WatchOptions",
    "collate",
]
