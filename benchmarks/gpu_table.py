"""`python benchmarks/gpu_table.py FILE.json...`: what bench_cuda.py has measured, as text.

Times, then a step's time (the slope between the shortest and the longest sequence of a case), then
the targets: reached, missed or not measured. Two clocks: "call" is a call on an idle GPU as its
caller sees it, Python included; "GPU" is what it takes there once the host is ahead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Document = dict[str, Any]

LIMITS = {
    "cluster": "latency of the exchanges in a cluster (forward 4 a step, backward 2)",
    "cooperative": "latency of the exchanges through L2 (forward 4 a step, backward 2)",
    "step": "launches of four kernels a step, or at large B their products",
}
"""The nearest limit of a step by the design; csrc/cuda/forward.h and backward.h."""


class Target(NamedTuple):
    """A ratio that a case must reach, at each length and in each of passes."""

    text: str
    kind: str
    precisions: tuple[str, ...]
    passes: tuple[str, ...]
    value: Callable[[Row], float | None]
    reached: Callable[[float], bool]


def times_faster(baseline: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        ours, theirs = (_seconds(row, "call", name) for name in (row["settings"]["ours"], baseline))
        return theirs / ours if ours and theirs else None

    return value


def _three_over_one(row: Row) -> float | None:
    three, one = (_seconds(row, "call", f"one call of N = {count}") for count in (3, 1))
    return three / one if three and one else None


BOTH = ("forward", "forward + backward")
TARGETS = [
    Target(
        ">= 4 times faster than nn.GRU",
        *("sequence", ("bfloat16",), BOTH),
        *(times_faster("nn.GRU"), lambda x: x >= 4),
    ),
    Target(
        ">= 3 times faster than nn.GRU",
        *("sequence", ("float32", "float32-high"), BOTH),
        *(times_faster("nn.GRU"), lambda x: x >= 3),
    ),
    Target(
        ">= 15 times faster than the eager reference",
        *("sequence", ("bfloat16",), BOTH),
        *(times_faster("eager reference"), lambda x: x >= 15),
    ),
    Target(
        ">= 4 times faster than its torch.compile",
        *("compiled", ("bfloat16",), BOTH),
        *(times_faster("compiled reference"), lambda x: x >= 4),
    ),
    Target(
        "N = 3 at most 1.2 times the time of one",
        *("group", ("bfloat16",), BOTH),
        *(_three_over_one, lambda x: x <= 1.2),
    ),
    Target(
        "ahead of FlashRNN's GRU",
        *("flashrnn", ("bfloat16",), BOTH),
        *(times_faster("FlashRNN GRU"), lambda x: x > 1),
    ),
    Target(
        "ahead of FlashRNN's LSTM",
        *("flashrnn", ("bfloat16",), BOTH),
        *(times_faster("FlashRNN LSTM"), lambda x: x > 1),
    ),
]
STEP_TARGET = 2.0
"""Microseconds of a forward step in bfloat16."""
HIDDEN, BATCH, LENGTHS = 512, 8, (64, 1024)
"""The case of the targets."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="what --results has written")
    chosen = parser.parse_args(arguments)
    print(text([json.loads(path.read_text()) for path in chosen.files]))


def text(documents: Sequence[Document]) -> str:
    """Documents of `report.write`, of one machine, as one text."""
    rows = [row for document in documents for row in document["comparisons"] if row.get("settings")]
    parts = [_header(document) for document in documents[:1]]
    parts.append(_times(rows))
    parts.append(_slopes(rows))
    parts.append(_targets(rows))
    missing = sorted(
        {f"{name}: {why}" for row in rows for name, why in row.get("missing", {}).items()}
    )
    failed = [test for document in documents for test in document.get("failed", [])]
    parts.append(_list("No number of", missing))
    parts.append(_list("Failed, and so not reported", failed))
    return "\n\n".join(part for part in parts if part)


def _header(document: Document) -> str:
    facts = {
        "commit": document.get("commit"),
        **(document.get("gpu") or {"GPU": "none"}),
        "torch": document.get("versions", {}).get("torch"),
        "extension": document.get("extension", {}).get("cuda"),
        "processor": document.get("processor"),
        "load before the run": document.get("load before the run"),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _times(rows: Sequence[Row]) -> str:
    """Microseconds of a call, and how many times faster ours is than each baseline."""
    body = []
    for row in rows:
        settings = row["settings"]
        calls, alone = row["seconds"]["call"], row["seconds"]["GPU"]
        ours = settings["ours"]
        others = [
            f"{name} {calls[name] / calls[ours]:.2f}x"
            + (f" ({alone[name] / alone[ours]:.2f}x)" if name in alone and ours in alone else "")
            for name in calls
            if name != ours
        ]
        body.append(
            [
                ours,
                row["case"],
                settings["precision"],
                settings["passes"],
                settings.get("path", ""),
                f"{1e6 * calls[ours]:.0f}",
                f"{1e6 * alone[ours]:.0f}" if ours in alone else "",
                f"{row['error']:.0e}",
                "; ".join(others),
            ]
        )
    head = ["ours", "TxBxH", "precision", "passes", "path", "call us", "GPU us", "error"]
    return _table(
        "A call, and the baselines' times over ours: by call (on the GPU); above 1 ours is faster",
        [*head, "times faster than"],
        body,
    )


def _slopes(rows: Sequence[Row]) -> str:
    body = []
    paths: set[str] = set()
    for case in _cases(rows):
        short, long = case[0], case[-1]
        if short is long:
            continue
        settings = long["settings"]
        names = [name for name in long["seconds"]["GPU"] if name in short["seconds"]["GPU"]]
        slopes = [f"{name} {slope:.2f}" for name in names if (slope := _slope(case, name))]
        path = settings.get("path", "")
        paths |= set(path.split(", ")) | set(names)
        body.append(
            [
                f"{settings['batch']}x{settings['hidden']}",
                settings["precision"],
                settings["passes"],
                path,
                "; ".join(slopes),
            ]
        )
    if not body:
        return ""
    legend = [f"{path}: {limit}" for path, limit in LIMITS.items() if path in paths]
    table = _table(
        "Microseconds a step on the GPU, the slope between the lengths",
        ["BxH", "precision", "passes", "path", "us a step"],
        body,
    )
    return "\n".join([table, "Nearest limit by the design, not measured:", *legend])


def _targets(rows: Sequence[Row]) -> str:
    body = [_step_target(rows)]
    for target in TARGETS:
        for precision in target.precisions:
            for passes in target.passes:
                chosen = [
                    row
                    for row in rows
                    if _is(row, target.kind, precision, passes)
                    and row["settings"]["hidden"] == HIDDEN
                    and row["settings"]["batch"] == BATCH
                ]
                seen = {row["settings"]["steps"]: target.value(row) for row in chosen}
                for steps in LENGTHS if target.kind != "compiled" else LENGTHS[:1]:
                    value = seen.get(steps)
                    body.append(
                        [
                            target.text,
                            f"T = {steps}, {precision}, {passes}",
                            "" if value is None else f"{value:.2f}",
                            _verdict(value, target.reached),
                        ]
                    )
    return _table(
        f"Targets at H = {HIDDEN}, B = {BATCH}, by call", ["target", "case", "is", ""], body
    )


def _step_target(rows: Sequence[Row]) -> list[str]:
    chosen = [
        row
        for row in rows
        if _is(row, "sequence", "bfloat16", "forward")
        and row["settings"]["hidden"] == HIDDEN
        and row["settings"]["batch"] == BATCH
    ]
    value = None
    for case in _cases(chosen):
        value = _slope(case, case[0]["settings"]["ours"])
    return [
        f"forward at most {STEP_TARGET} us a step",
        "bfloat16, on the GPU",
        "" if value is None else f"{value:.2f}",
        _verdict(value, lambda x: x <= STEP_TARGET),
    ]


def _verdict(value: float | None, reached: Callable[[float], bool]) -> str:
    if value is None:
        return "not measured"
    return "reached" if reached(value) else "missed"


def _is(row: Row, kind: str, precision: str, passes: str) -> bool:
    settings = row["settings"]
    return (settings["kind"], settings["precision"], settings["passes"]) == (
        kind,
        precision,
        passes,
    )


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in T alone, shortest first."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        names = ("kind", "batch", "hidden", "precision", "passes")
        cases.setdefault(tuple(settings[name] for name in names), []).append(row)
    return [sorted(case, key=lambda row: int(row["settings"]["steps"])) for case in cases.values()]


def _slope(case: Sequence[Row], name: str) -> float | None:
    """Microseconds a step of one contender on the GPU."""
    times = [(row["settings"]["steps"], _seconds(row, "GPU", name)) for row in case]
    known = [(steps, seconds) for steps, seconds in times if seconds is not None]
    if len(known) < 2:
        return None
    (short, before), (long, after) = known[0], known[-1]
    return 1e6 * (after - before) / (long - short)


def _seconds(row: Row, clock: str, name: str) -> float | None:
    seconds: float | None = row["seconds"].get(clock, {}).get(name)
    return seconds


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return ""
    lines = [head, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([title, *aligned])


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else ""


if __name__ == "__main__":
    main()
