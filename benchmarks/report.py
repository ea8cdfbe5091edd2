"""The report of a run of the benchmarks: tables of ratios, and everything as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmixer_kernels import info, provenance
from mmixer_kernels.atomic import replacing
from mmixer_kernels.comparison.timing import Ratio


@dataclass
class Comparison:
    """One row of a table: ratios to each baseline, or other numbers ready to print."""

    table: str
    case: str
    threads: int
    error: float | None
    """Largest relative error of the check that came first; None without one."""
    rounds: int
    ratios: dict[str, Ratio] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """The names and values by which gpu_table.py finds a case."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Medians of each contender, by the kind of clock."""
    by_host: list[str] = field(default_factory=list)
    """Contenders whose seconds of the clock "GPU" are the host's (`clocks.by_host`)."""
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    """Names of what each contender starts on the GPU, and how often."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders without a number, and the reason."""
    multiply_adds: dict[str, float] = field(default_factory=dict)
    """Of contenders, ours first: those of a forward's row in units of H^2."""


def tables(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as aligned text, one table after another."""
    grouped: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        grouped.setdefault(comparison.table, []).append(comparison)
    return "\n\n".join(_table(title, rows) for title, rows in grouped.items())


def facts() -> dict[str, Any]:
    """The commit, the processor, the GPU, and what `python -m mmixer_kernels.info` prints."""
    return {
        "commit": provenance.commit(),
        "processor": provenance.processor(),
        "gpu": gpu(),
        **info.collect(),
    }


def write(
    path: Path,
    facts: dict[str, Any],
    comparisons: Sequence[Comparison],
    failed: Sequence[str],
    load: float,
) -> None:
    """`facts`, comparisons and the tests that failed (of which nothing is reported) as JSON.

    The file is whole at any time, since a run may be cut off.
    """
    document = {
        **facts,
        "load before the run": load,
        "comparisons": [
            {
                **vars(comparison),
                "ratios": {name: ratio._asdict() for name, ratio in comparison.ratios.items()},
            }
            for comparison in comparisons
        ],
        "failed": list(failed),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")


def _table(title: str, rows: Sequence[Comparison]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in (*row.ratios, *row.shares)))
    work = {name: x for row in rows for name, x in row.multiply_adds.items()}
    head = [f"{name} [{work[name]:g}]" if name in work else name for name in columns]
    body = [["case", "threads", *(["multiply-adds"] if work else []), *head, "error", "rounds"]]
    for row in rows:
        values = {**{name: str(ratio) for name, ratio in row.ratios.items()}, **row.shares}
        cells = [values.get(name, "") for name in columns]
        error = "" if row.error is None else f"{row.error:.0e}"
        ours = [f"[{next(iter(row.multiply_adds.values())):.3g}]"] if work else []
        body.append([row.case, str(row.threads), *ours, *cells, error, str(row.rounds)])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in body
    ]
    if work:
        lines.append("[multiply-adds of a forward's row, in units of H^2]")
    missing = {name: why for row in rows for name, why in row.missing.items()}
    return "\n".join([title, *lines, *(f"no {name}: {why}" for name, why in missing.items())])


GPU = (
    ("name", "name"),
    ("driver", "driver_version"),
    ("SM clock now", "clocks.sm"),
    ("SM clock at most", "clocks.max.sm"),
    ("memory clock now", "clocks.mem"),
    ("power limit", "power.limit"),
    ("temperature", "temperature.gpu"),
)
"""The facts that are told of a GPU, and nvidia-smi's names of them."""


def gpu() -> dict[str, Any] | None:
    """The current GPU as nvidia-smi and torch see it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    major, minor = properties.major, properties.minor
    facts: dict[str, Any] = {
        "name": properties.name,
        "compute capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }
    names = ",".join(name for _, name in GPU)
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"nvidia-smi": f"no answer: {error}"}
    values = answer.stdout.strip().split(", ")
    return facts | dict(zip((title for title, _ in GPU), values, strict=False))
