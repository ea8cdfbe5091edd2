"""`python benchmarks/plot.py`: time against T, B and H beside nn.GRU and nn.LSTM, as a PNG.

Each point is the median of interleaved rounds; it is drawn only when the kernel has passed its
check against the float64 reference. The grey line is what strictly linear cost would be (in H: a
cost that grows with H^2).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import problems
import report
import torch
from matplotlib.figure import Figure
from problems import Size

from mmixer_kernels import provenance
from mmixer_kernels.comparison.passes import PASSES
from mmixer_kernels.comparison.timing import WARMING, interleave

DOCS = Path(__file__).parents[1] / "docs"
BASE = Size(64, 8, 256)
SWEEPS = {
    "steps": [4, 8, 16, 32, 64, 128, 256],
    "batch": [1, 2, 4, 8, 16, 32, 64],
    "hidden": [32, 64, 128, 256, 512],
}
LABELS = {"steps": "T", "batch": "B", "hidden": "H"}
UNITS = ("FusedMCU", "nn.GRU", "nn.LSTM")
COLORS = ("tab:red", "tab:blue", "tab:green")

Point = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DOCS / "cpu_scaling.png", help="the PNG")
    parser.add_argument("--results", type=Path, help="write the points as JSON there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds of rounds for each point"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    points = measure(chosen.threads, chosen.budget)
    title = (
        f"{provenance.processor()}, {chosen.threads} thread{'s' * (chosen.threads > 1)}, float32"
    )
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    draw(points, title).savefig(chosen.output, dpi=120)
    if chosen.results is not None:
        document = {**report.facts(), "threads": chosen.threads, "points": points}
        chosen.results.write_text(json.dumps(document, indent=2) + "\n")


def measure(threads: int, budget: float) -> list[Point]:
    """Milliseconds of each unit at each size of each sweep, forward and forward + backward."""
    cpu = torch.device("cpu")
    points = []
    for axis, values in SWEEPS.items():
        for value in values:
            size = BASE._replace(**{axis: value})
            error = problems.check_sequence(size, "cpu", cpu, threads)
            for passes in PASSES:
                contenders = problems.sequence_contenders(size, passes, "cpu", cpu)
                drawn = [x for x in contenders if x.name in UNITS]
                times = interleave(drawn, budget, warming=WARMING)
                milliseconds = {name: 1e3 * median(x) for name, x in times.items()}
                points.append(
                    {"axis": axis, "size": size, "passes": passes, "error": error, **milliseconds}
                )
            print(f"{size}: done")
    return points


def draw(points: Sequence[Point], title: str) -> Figure:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(len(PASSES), len(SWEEPS), sharex="col", sharey="row")
    for row, passes in zip(panels, PASSES, strict=True):
        for panel, axis in zip(row, SWEEPS, strict=True):
            chosen = [p for p in points if p["axis"] == axis and p["passes"] == passes]
            x = [getattr(p["size"], axis) for p in chosen]
            for unit, color in zip(UNITS, COLORS, strict=True):
                panel.plot(x, [p[unit] for p in chosen], "o-", ms=3, color=color, label=unit)
            power = 2 if axis == "hidden" else 1
            last = chosen[-1]["FusedMCU"]
            linear = [last * (value / x[-1]) ** power for value in x]
            panel.plot(x, linear, "--", lw=1, color="0.6", label="proportional", zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(x, [str(value) for value in x])
            panel.grid(True, which="major", color="0.9")
        row[0].set_ylabel(f"{passes}, ms")
    for panel, axis in zip(panels[-1], SWEEPS, strict=True):
        fixed = ", ".join(
            f"{LABELS[name]} = {value}" for name, value in BASE._asdict().items() if name != axis
        )
        panel.set_xlabel(f"{LABELS[axis]} ({fixed})")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    main()
