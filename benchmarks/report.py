"""What a run of the benchmarks leaves: tables of ratios, and everything as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timing import Ratio

from mmixer_kernels import info


@dataclass
class Comparison:
    """One row of a table: ratios to each baseline, or other numbers ready to print."""

    table: str
    case: str
    threads: int
    error: float
    """Largest relative error of the check that came first."""
    rounds: int
    ratios: dict[str, Ratio] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)


def tables(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as aligned text, one table after another."""
    grouped: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        grouped.setdefault(comparison.table, []).append(comparison)
    return "\n\n".join(_table(title, rows) for title, rows in grouped.items())


def facts() -> dict[str, Any]:
    """The commit, the processor, and what `python -m mmixer_kernels.info` prints."""
    return {"commit": _commit(), "processor": processor(), **info.collect()}


def write(
    path: Path, comparisons: Sequence[Comparison], failed: Sequence[str], load: float
) -> None:
    """Comparisons, the tests that failed (of which nothing is reported) and `facts` as JSON."""
    document = {
        **facts(),
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
    path.write_text(json.dumps(document, indent=2) + "\n")


def _table(title: str, rows: Sequence[Comparison]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in (*row.ratios, *row.shares)))
    body = [["case", "threads", *columns, "error", "rounds"]]
    for row in rows:
        values = {**{name: str(ratio) for name, ratio in row.ratios.items()}, **row.shares}
        cells = [values.get(name, "") for name in columns]
        body.append([row.case, str(row.threads), *cells, f"{row.error:.0e}", str(row.rounds)])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in body
    ]
    return "\n".join([title, *lines])


def _commit() -> str:
    """The commit of this checkout, with "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
    return answer.stdout.strip()


def processor() -> str:
    """The model name that Linux gives, or "unknown"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
