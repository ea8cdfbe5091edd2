"""`python benchmarks/gpu_table.py FILE.json...`: what was seen on a GPU, as text.

FILE is the one document of `on_gpu.py`, or there are several files of `--results`.

Times, then a step's time (the slope between the shortest and the longest sequence of a case), then
the targets: reached, bar reached, missed or not measured. Three clocks: "call" is a call on an idle
GPU as its caller sees it, Python included; "host" is the part of it until the call returns; "GPU"
is what it takes there once the host is ahead. A number of the latter is marked "host" where the
host was not ahead: nothing is concluded from it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Document = dict[str, Any]

LIMITS = {
    "cluster": "latency of the exchanges in a cluster (forward 4 per step, backward 2)",
    "cooperative": "latency of the exchanges through L2 (forward 4 per step, backward 2)",
    "wide": "latency of the exchanges through L2, in packets of 16 bytes",
    "step": "launches of four kernels per step, or at large B their products",
}
"""The nearest limit of a step by the design; csrc/cuda/forward.h and backward.h."""

KERNEL = ("path", "direction", "hidden", "terms", "term_dtype", "samples")
"""The keys that name a persistent kernel in a record of the probe."""
PROBE = {
    "device": (
        "The device, by the probe",
        ("name", "capability", "multiprocessors", "l2_mib", "clock_mhz", "runtime", "driver"),
    ),
    "hang": ("Kernels that did not end", KERNEL),
    "error": ("Errors of the probe", ("what",)),
    "clusters": ("Clusters that run at once", ("size", "at_once", "why")),
    "teams": ("Teams that run at once", (*KERNEL, "teams", "why")),
    "exchange": (
        "Exchanges in a cluster",
        ("what", "wait", "blocks", "clusters", "bytes", "cycles", "ns"),
    ),
    "l2": ("Exchanges through L2", ("what", "cycles", "ns")),
    "launch": ("Launches", ("what", "us")),
    "kernel": (
        "The recurrence's kernels by themselves; differ: runs whose bits are not the first one's",
        (
            *(*KERNEL, "teams"),
            *("us_per_step", "us_64", "us_1024", "not_finite", "differ", "runs", "error"),
        ),
    ),
    "cell": (
        "The kernel of one step by itself",
        ("hidden", "context", "batch", "us", "not_finite", "differ", "runs"),
    ),
}
"""Kinds of the probe's records in the order of the text: title and columns of each one's table."""

HIDDEN, BATCH, LENGTHS = 512, 8, (64, 1024)
WIDE = (768, 16)
"""Hidden and batch size of the case that others have published cuDNN's time of."""
BOTH = ("forward", "forward + backward")
OURS = "ours"
RECURRENCE = re.compile("rnn|lstm|gru|persist", re.IGNORECASE)
"""The words that the names of cuDNN's recurrent kernels have in them."""


class Case(NamedTuple):
    precision: str
    passes: str
    hidden: int = HIDDEN
    batch: int = BATCH
    steps: int | None = None
    modalities: int | None = None

    def __str__(self) -> str:
        modalities = "" if self.modalities is None else f"N = {self.modalities}, "
        size = f"{self.steps or 'T'}x{self.batch}x{self.hidden}"
        return f"{size}, {modalities}{self.precision}, {self.passes}"


class Value(NamedTuple):
    """A measured number; None where there is none, and why or of what else."""

    number: float | None
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A number that each of the cases must reach: the aim, or at least the bar.

    ratio: whose time of a call over whose; None is ours by the step, on the GPU.
    """

    text: str
    aim: float
    cases: tuple[Case, ...]
    bar: float | None = None
    at_most: bool = False
    kind: str = "sequence"
    ratio: tuple[str, str] | None = None

    def __str__(self) -> str:
        bar = "" if self.bar is None else f" (bar {self.bar:g})"
        return f"{self.text}: at {'most' if self.at_most else 'least'} {self.aim:g}{bar}"

    def verdict(self, value: Value) -> str:
        if value.number is None or not math.isfinite(value.number):
            return f"not measured ({value.note})" if value.note else "not measured"
        if self._meets(self.aim, value.number):
            return "reached"
        return "bar reached" if self.bar and self._meets(self.bar, value.number) else "missed"

    def _meets(self, limit: float, number: float) -> bool:
        return number <= limit if self.at_most else number >= limit


def _cases(
    *precisions: str,
    steps: Sequence[int] = LENGTHS,
    wide: bool = False,
    modalities: int | None = None,
) -> tuple[Case, ...]:
    hidden, batch = WIDE if wide else (HIDDEN, BATCH)
    return tuple(
        Case(precision, passes, hidden, batch, length, modalities)
        for precision in precisions
        for passes in BOTH
        for length in steps
    )


STEP = "us per step"
TARGETS = [
    Target(STEP, 1.5, (Case("bfloat16", BOTH[0]),), bar=1.9, at_most=True),
    Target(STEP, 4.0, (Case("bfloat16", BOTH[1]),), bar=5.0, at_most=True),
    Target(f"{STEP}, published 1.96", 1.9, (Case("bfloat16", BOTH[0], *WIDE),), at_most=True),
    Target(f"{STEP}, published 5.07", 5.0, (Case("bfloat16", BOTH[1], *WIDE),), at_most=True),
    Target(
        "times as fast as nn.LSTM",
        1,
        _cases("float16") + _cases("float16", wide=True),
        ratio=("nn.LSTM", OURS),
    ),
    Target("times as fast as nn.GRU", 6, _cases("bfloat16"), bar=4, ratio=("nn.GRU", OURS)),
    Target(
        "times as fast as nn.GRU",
        6,
        _cases("float32", "float32-high"),
        bar=3,
        ratio=("nn.GRU", OURS),
    ),
    Target(
        "time of N = 3 over N = 1",
        1.2,
        _cases("bfloat16"),
        at_most=True,
        kind="group",
        ratio=("one call of N = 3", "one call of N = 1"),
    ),
    Target(
        "time of both directions over one, without context",
        1.2,
        _cases("bfloat16"),
        at_most=True,
        kind="stack",
        ratio=(OURS, "FusedMCU"),
    ),
    Target(
        "times as fast as N calls of nn.GRU",
        1,
        tuple(
            case
            for modalities in (1, 2, 3)
            for case in _cases("bfloat16", steps=(9,), modalities=modalities)
        ),
        kind="paper",
        ratio=("nn.GRU", OURS),
    ),
    Target(
        "times as fast as the eager reference",
        15,
        _cases("bfloat16"),
        ratio=("eager reference", OURS),
    ),
    Target(
        "times as fast as its torch.compile",
        4,
        _cases("bfloat16", steps=LENGTHS[:1]),
        kind="compiled",
        ratio=("compiled reference", OURS),
    ),
    *(
        Target(
            f"times as fast as {name}", 1, _cases("bfloat16"), kind="flashrnn", ratio=(name, OURS)
        )
        for name in ("FlashRNN GRU", "FlashRNN LSTM")
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", type=Path, nargs="+", help="what on_gpu.py or --results has written"
    )
    chosen = parser.parse_args(arguments)
    contents = {str(path): json.loads(path.read_text()) for path in chosen.files}
    if all("comparisons" in content for content in contents.values()):
        print(text({"results": contents}))
    elif len(contents) == 1:
        print(text(*contents.values()))
    else:
        parser.error("FILE must be one document of on_gpu.py, or each must be of --results")


def text(document: Document) -> str:
    """All that `on_gpu.py` leaves of one machine, as one text.

    document: "commit", "gpu", "parts" (verdict and seconds by name), "left out" (why, by path),
    "probe" (the records of gpu_probe) and "results" (what `report.write` wrote, by name). Each key
    may be absent or empty.
    """
    results = list((document.get("results") or {}).values())
    probe = document.get("probe") or []
    rows = [row for result in results for row in result.get("comparisons") or []]
    timed = [row for row in rows if row.get("settings") and row.get("seconds")]
    others = [row for row in rows if row.get("ratios") and row not in timed]
    missing = {f"{name}: {why}" for row in rows for name, why in (row.get("missing") or {}).items()}
    left_out = [f"{path}: {why}" for path, why in (document.get("left out") or {}).items()]
    failed = [test for result in results for test in result.get("failed") or []]
    sections = [
        _section(_header, document, results, probe),
        _section(_parts, document.get("parts") or {}),
        _list("Left out", left_out),
        *(_section(_probe, probe, kind) for kind in PROBE),
        _section(_variants, probe),
        _section(_other_records, probe),
        _section(_times, timed),
        _section(_slopes, timed),
        _section(_others, others),
        _section(_kernels, [row for row in rows if row.get("kernels")]),
        _section(_targets, timed, probe),
        _list("No number of", sorted(missing)),
        _list("Failed, and so not reported", failed),
    ]
    return "\n\n".join(section for section in sections if section)


def _section(write: Callable[..., str], *contents: Any) -> str:
    """A number that is not what it should be costs its own section, and not the others."""
    try:
        return write(*contents)
    except Exception as problem:
        return f"no section {write.__name__[1:]}: {type(problem).__name__}: {problem}"


def _header(document: Document, results: Sequence[Document], probe: Sequence[Any]) -> str:
    """The facts of the first result; the probe's, where there is none."""
    facts: dict[str, Any]
    if results:
        first = results[0]
        facts = {
            "commit": first.get("commit") or document.get("commit"),
            **(first.get("gpu") or {"GPU": document.get("gpu") or "none"}),
            "torch": (first.get("versions") or {}).get("torch"),
            "extension": (first.get("extension") or {}).get("cuda"),
            "processor": first.get("processor"),
            "load before the run": first.get("load before the run"),
        }
    else:
        facts = {"commit": document.get("commit"), "GPU": document.get("gpu") or "none"}
        for record in _of_kind(probe, "device")[:1]:
            facts |= {name: value for name, value in record.items() if name != "kind"}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _parts(parts: dict[str, Any]) -> str:
    body = [
        [name, *(_cell(part.get(x)) for x in ("seconds", "passed", "skipped", "verdict"))]
        for name, part in parts.items()
    ]
    head = ["part", "seconds", "passed", "skipped", "verdict"]
    return _table("Parts of the run, and their tests", head, body)


def _probe(records: Sequence[Any], kind: str) -> str:
    """The records of a kind. A field without a column gets one."""
    title, columns = PROBE[kind]
    chosen = _of_kind(records, kind)
    head = [*columns, *(name for record in chosen for name in record)]
    head = [name for name in dict.fromkeys(head) if name != "kind"]
    return _table(title, head, [[_cell(record.get(x)) for x in head] for record in chosen])


def _variants(records: Sequence[Any]) -> str:
    """Kernels of the probe beside those of which they are a variant."""
    steps = {}
    for record in _of_kind(records, "kernel"):
        if step := _sound_step(record):
            steps[tuple(record.get(name) for name in KERNEL)] = step
    body = []
    for kernel, step in steps.items():
        path, *size, samples = kernel
        baselines = {}
        if samples == 4:
            baselines["8 samples"] = (path, *size, 8)
        if path == "wide":
            baselines["cooperative"] = ("cooperative", *size, samples)
        ratios = [
            f"{name} {steps[baseline] / step:.2f}x"
            for name, baseline in baselines.items()
            if baseline in steps
        ]
        if ratios:
            body.append([*map(_cell, kernel), "; ".join(ratios)])
    return _table(
        "Variants of the recurrence's kernels by themselves: their baselines' steps over theirs; "
        "above 1 the variant is faster",
        [*KERNEL, "times faster than"],
        body,
    )


def _other_records(records: Sequence[Any]) -> str:
    known = [record for kind in PROBE for record in _of_kind(records, kind)]
    return _list("Other records of the probe", [json.dumps(x) for x in records if x not in known])


def _of_kind(records: Sequence[Any], kind: str) -> list[Row]:
    return [x for x in records if isinstance(x, dict) and x.get("kind") == kind]


def _times(rows: Sequence[Row]) -> str:
    """Microseconds of a call, and how many times faster ours is than each baseline."""
    body = []
    for row in rows:
        settings = row["settings"]
        ours = settings["ours"]
        names = [name for name in row["seconds"]["call"] if name != ours]
        body.append(
            [
                ours,
                row["case"],
                settings["precision"],
                settings["passes"],
                settings.get("path", ""),
                f"{1e6 * row['seconds']['call'][ours]:.0f}",
                _host_microseconds(row, ours),
                _gpu_microseconds(row, ours),
                f"{row['error']:.0e}",
                "; ".join(_times_faster(row, ours, name) for name in names),
            ]
        )
    head = ["ours", "TxBxH", "precision", "passes", "path", "call us", "host us", "GPU us", "error"]
    return _table(
        "A call, and the baselines' times over ours: by call [95 % interval] (on the GPU), until "
        "it returns; above 1 ours is faster",
        [*head, "times faster than"],
        body,
    )


def _host_microseconds(row: Row, name: str) -> str:
    seconds = _seconds(row, "host", name)
    return "" if seconds is None else f"{1e6 * seconds:.0f}"


def _gpu_microseconds(row: Row, name: str) -> str:
    seconds = _seconds(row, "GPU", name)
    if seconds is None:
        return ""
    return f"{1e6 * seconds:.0f}" + " host" * _by_host(row, name)


def _times_faster(row: Row, ours: str, name: str) -> str:
    calls, alone = row["seconds"]["call"], row["seconds"].get("GPU", {})
    answer = f"{name} {calls[name] / calls[ours]:.2f}x"
    if ratio := (row.get("ratios") or {}).get(name):
        answer += f" [{1 / ratio['high']:.2f}-{1 / ratio['low']:.2f}]"
    if name in alone and ours in alone:
        host = " host" * (_by_host(row, name) or _by_host(row, ours))
        answer += f" ({alone[name] / alone[ours]:.2f}x{host})"
    if (theirs := _seconds(row, "host", name)) and (own := _seconds(row, "host", ours)):
        answer += f", returns {theirs / own:.2f}x"
    return answer


def _slopes(rows: Sequence[Row]) -> str:
    body = []
    paths: set[str] = set()
    for case in _same_but_length(rows):
        settings = case[-1]["settings"]
        slopes = {name: _slope(case, name) for name in case[-1]["seconds"].get("GPU", {})}
        told = [
            f"{name} {slope.note if slope.number is None else f'{slope.number:.2f}'}"
            for name, slope in slopes.items()
            if slope != Value(None)
        ]
        # Lengths as near as the paper's tell more of noise than of a step.
        if not told or settings["kind"] == "paper":
            continue
        path = settings.get("path", "")
        paths |= {*path.split(", "), *slopes}
        sizes = f"{settings['batch']}x{settings['hidden']}"
        body.append([sizes, settings["precision"], settings["passes"], path, "; ".join(told)])
    if not body:
        return ""
    legend = [f"{path}: {limit}" for path, limit in LIMITS.items() if path in paths]
    table = _table(
        "Microseconds per step on the GPU, the slope between the lengths",
        ["BxH", "precision", "passes", "path", "us per step"],
        body,
    )
    return "\n".join([table, "Nearest limit by the design, not measured:", *legend])


def _others(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        ratios = "; ".join(
            f"{name} {ratio['of_medians']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
            for name, ratio in row["ratios"].items()
        )
        body.append([row.get("table", ""), row["case"], ratios])
    return _table(
        "Our time over the baselines' (95 % interval), below 1 is faster",
        ["of", "TxBxH", "over the time of"],
        body,
    )


def _kernels(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        for name, counts in row["kernels"].items():
            told = "; ".join(f"{count} {kernel}" for kernel, count in _recurrent(counts).items())
            started = str(sum(counts.values()))
            body.append([row.get("table", ""), row["case"], name, started, told or "none"])
    head = ["table", "TxBxH", "contender", "started", "of these, recurrent by their name"]
    return _table("Kernels, copies and fills that a call starts on the GPU", head, body)


def _recurrent(counts: dict[str, int]) -> Counter[str]:
    """The number of starts of each kernel of a recurrence, by its name without types."""
    short: Counter[str] = Counter()
    for name, count in counts.items():
        plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        plain = re.split(r"[<(]", plain)[0].split("::")[-1][:60]
        if RECURRENCE.search(plain):
            short[plain] += count
    return short


def _targets(rows: Sequence[Row], probe: Sequence[Any]) -> str:
    body = []
    for target in TARGETS:
        for case in target.cases:
            chosen = [row for row in rows if _is(row, target.kind, case)]
            value = _ratio(chosen, target.ratio) if target.ratio else _step(chosen)
            number = "" if value.number is None else f"{value.number:.2f}"
            if not number and not target.ratio:
                number = _step_by_the_probe(probe, case)
            body.append([str(target), str(case), number, target.verdict(value)])
    return _table(
        "Targets: steps on the GPU, ratios by call; published: cuDNN's LSTM in float16 on an H100",
        ["target", "case (TxBxH)", "is", ""],
        body,
    )


def _is(row: Row, kind: str, case: Case) -> bool:
    settings = row["settings"]
    wanted = {name: x for name, x in case._asdict().items() if x is not None}
    return all(settings.get(name) == x for name, x in {"kind": kind, **wanted}.items())


def _ratio(rows: Sequence[Row], names: tuple[str, str]) -> Value:
    """The ratio in the last measurement of a case."""
    for row in reversed(rows):
        over, under = (
            _seconds(row, "call", row["settings"]["ours"] if name == OURS else name)
            for name in names
        )
        if over and under:
            return Value(over / under)
    return Value(None)


def _step(rows: Sequence[Row]) -> Value:
    """Our microseconds per step, of the rows of one case."""
    return _slope(sorted(rows, key=_length), rows[0]["settings"]["ours"]) if rows else Value(None)


def _step_by_the_probe(records: Sequence[Any], case: Case) -> str:
    """The fastest of the kernels that gave equal and finite numbers; of a forward alone, since a
    forward and a backward kernel are not all that a training step has."""
    if case.passes != "forward":
        return ""
    steps = {}
    for record in _of_kind(records, "kernel"):
        wanted = {
            "direction": "forward",
            "hidden": case.hidden,
            "terms": 1,
            "term_dtype": case.precision,
        }
        step = _sound_step(record)
        if step is not None and wanted.items() <= record.items():
            samples, teams = record.get("samples"), record.get("teams")
            steps[step] = f"{record.get('path')}, teams: {teams} of {samples} samples"
    return f"{min(steps):.2f} by the probe ({steps[min(steps)]})" if steps else ""


def _sound_step(record: Row) -> float | None:
    """Microseconds per step of a kernel of the probe, if its numbers were equal and finite."""
    step = record.get("us_per_step")
    sound = not record.get("not_finite") and not record.get("differ")
    return step if sound and isinstance(step, int | float) else None


def _same_but_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in T alone, shortest first."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        names = ("kind", "batch", "hidden", "precision", "passes", "modalities")
        cases.setdefault(tuple(settings.get(name) for name in names), []).append(row)
    return [sorted(case, key=_length) for case in cases.values()]


def _length(row: Row) -> int:
    return int(row["settings"]["steps"])


def _slope(case: Sequence[Row], name: str) -> Value:
    """Microseconds per step of one contender on the GPU, of rows by length."""
    known = [row for row in case if _seconds(row, "GPU", name) is not None]
    if not known or _length(known[0]) == _length(known[-1]):
        return Value(None)
    short, long = known[0], known[-1]
    if _by_host(short, name) or _by_host(long, name):
        return Value(None, "host")
    seconds = long["seconds"]["GPU"][name] - short["seconds"]["GPU"][name]
    return Value(1e6 * seconds / (_length(long) - _length(short)))


def _by_host(row: Row, name: str) -> bool:
    return name in (row.get("by_host") or [])


def _seconds(row: Row, clock: str, name: str) -> float | None:
    seconds: float | None = row["seconds"].get(clock, {}).get(name)
    return seconds


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
