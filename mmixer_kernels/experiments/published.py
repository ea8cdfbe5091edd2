"""Figures of the paper and of those it compares with: top-1 accuracy in percent."""

from __future__ import annotations

from ..training.options import Options

ABLATIONS = {
    "table1": {"m-mixer": 90.77, "max": 90.65, "gru-summarizer": 90.66},
    "table2": {"lstm": 84.58, "gru": 84.87, "m-mixer": 90.77},
    "table3": {"own-content": 86.82, "concatenation": 87.76, "no-norm": 89.97, "m-mixer": 90.77},
}
"""Tables 1-3 by network, on NTU RGB+D 60 with RGB and depth."""

STREAMS = {
    "rgb": {"self": 56.61, "m-mixer": 79.42},
    "depth": {"self": 84.31, "m-mixer": 88.59},
    "rgb+depth": {"self": 88.17, "m-mixer": 90.77},
}
"""Table 4, by stream and network, on the same."""

COMPARISONS: dict[str, list[tuple[str, str, float]]] = {
    "ntu60": [
        ("Shahroudy et al.", "RGB + depth", 74.86),
        ("Liu et al.", "RGB + depth", 77.5),
        ("ADMD", "RGB + depth", 77.74),
        ("Dhiman et al.", "RGB + depth", 79.4),
        ("Garcia et al.", "RGB + depth", 79.73),
        ("c-ConvNet", "RGB + depth", 86.42),
        ("DMCL", "RGB + depth + flow", 87.25),
        ("Wang et al.", "RGB + depth + flow", 89.51),
        ("M-Mixer, the paper", "RGB + depth", 90.77),
        ("M-Mixer, the paper", "RGB + depth + IR", 91.13),
    ],
    "ntu120": [
        ("VGG", "RGB + depth", 61.9),
        ("DMCL", "RGB + depth + flow", 89.74),
        ("M-Mixer, the paper", "RGB + depth", 90.12),
    ],
    "nw-ucla": [
        ("Garcia et al.", "RGB + depth", 88.87),
        ("ADMD", "RGB + depth", 89.93),
        ("Dhiman et al.", "RGB + depth", 84.58),
        ("DMCL", "RGB + depth + flow", 93.79),
        ("M-Mixer, the paper", "RGB + depth", 94.43),
    ],
    "watch": [
        ("Burns et al. 2018, first version, 10 people", "accelerometer + gyroscope", 87.3),
        ("Burns et al. 2018, CRNN, 20 people", "accelerometer + gyroscope", 88.9),
    ],
}
"""Tables 5-7 by data set; of watch, arXiv:1802.01489, five folds by subject."""


def of_ablation(table: str, base: Options) -> dict[str, float]:
    """The paper's figures of a table where the data are the paper's, or else none."""
    return ABLATIONS.get(table, {}) if _is_papers(base) else {}


def behind(table: str) -> set[str]:
    """The networks that M-Mixer is ahead of in a table of the paper."""
    return set(ABLATIONS.get(table, {})) - {"m-mixer"}


def of_streams(base: Options) -> dict[str, dict[str, float]]:
    """The paper's figures of Table 4 where the data are the paper's, or else none."""
    return STREAMS if _is_papers(base) else {}


def _is_papers(base: Options) -> bool:
    return base.run.data == "ntu60" and getattr(base.data, "modalities", ()) == ("rgb", "depth")
