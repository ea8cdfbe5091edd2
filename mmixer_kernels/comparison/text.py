"""The report of `measure.compare` as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from .machine import BUSY
from .measure import OTHERS, OURS
from .timing import Ratio

WIDTH = 100
"""Characters of a line."""


def describe(report: dict[str, Any]) -> str:
    """The report of `compare` in words, a section for each question; lines that are no table are
    broken to `WIDTH`.

    Args:
        report: what `compare` returned.
    """
    sections = [
        _case(report["case"], report["machine"]),
        _engine(report["engine"]),
        _check(report),
        _times(report),
        _limits(report),
        _sentences("settings that slow calls", report["settings"]),
        _sentences("what would help, as measured here", report["advice"]),
    ]
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def _broken(text: str) -> str:
    """A line as a paragraph whose other lines stand further in."""
    further = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, WIDTH, subsequent_indent=further, break_on_hyphens=False)


def _case(case: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    yield _broken(
        f"FusedMCU of T = {case['steps']}, B = {case['batch']}, H = {case['hidden_size']}, input "
        f"{case['input_size']}, context {case['context_size'] or 'none'}, {case['dtype']}, on "
        f"{case['device']} ({machine['device']}); torch has {machine['threads']} "
        f"thread{'s' * (machine['threads'] > 1)} for {machine['processors']} processors"
    )
    load, count = machine["load"], machine["processors"]
    if load is not None and load > BUSY * count:
        yield _broken(
            f"warning: the machine was busy before (load {load:.1f} on {count} processors): times "
            "are longer, and ratios less sure, than on an idle one"
        )


def _engine(engine: dict[str, Any]) -> Iterator[str]:
    yield f"engine {engine['name']}: {engine['why']}"
    for passes, way in engine["ways"].items():
        yield _broken(f"  {passes}: {way}")
    for name, why in engine["others"].items():
        yield _broken(f"  not {name}: {why}")


def _check(report: dict[str, Any]) -> Iterator[str]:
    check, steps = report["check"], report["case"]["steps"]
    part = "" if check["steps"] == steps else f", its first {check['steps']} steps"
    yield _broken(
        f"checked against float64{part}: the largest relative error of outputs and gradients is "
        f"{check['error']:.1e} ({check['tolerance']:.0e} is allowed)"
    )


def _times(report: dict[str, Any]) -> Iterator[str]:
    """A table: medians, our time over each other's, and the memory that backward needs."""
    passes = list(report["seconds"])
    saved = report["saved_bytes"]
    head = ["", *(x for name in passes for x in (f"{name}, ms", "ratio"))]
    rows = [[*head, "kept, MB"] if saved else head]
    for name in (OURS, *OTHERS):
        if not any(name in report["seconds"][taken] for taken in passes):
            continue  # recompute=True, where there is no backward; or named below the table
        row = [name]
        for taken in passes:
            seconds = report["seconds"][taken].get(name)
            ratio = report["ratios"][taken].get(name)
            row.append("" if seconds is None else f"{1e3 * seconds:.3g}")
            row.append("" if ratio is None else str(Ratio(**ratio)))
        if saved:
            row.append(f"{saved[name] / 1e6:.2f}" if name in saved else "")
        rows.append(row)
    yield from _table(rows)
    rounds = " and ".join(str(n) for n in report["rounds"].values())
    yield f"  ms: medians of {rounds} rounds, in turns"
    yield "  ratio: FusedMCU's time over this one's, and its 95 % interval; below 1 it is faster"
    if saved:
        yield (
            "  kept: what autograd holds for backward, each storage once, without parameters and "
            "operands"
        )
    yield from (_broken(f"  no {name}: {why}") for name, why in report["missing"].items())


def _limits(report: dict[str, Any]) -> Iterator[str]:
    yield "what limits it"
    for passes, limits in report["limits"].items():
        yield _broken(f"  {passes}: {limits['limit']}")
    has_steps = report["case"]["steps"] > 1
    rows = [["", "GFLOP", "GFLOP/s", "recurrent", "at once", *["T = 1"] * has_steps]]
    for passes, limits in report["limits"].items():
        shares = [f"{x:.2f}" for x in limits["shares"].values()]
        numbers = [f"{limits[x] / 1e9:.3g}" for x in ("operations", "operations_per_second")]
        rows.append([passes, *numbers, *shares])
    yield from _table(rows)
    yield "  recurrent, at once: torch.mm's time for the same products alone, over FusedMCU's"
    if has_steps:
        yield "  T = 1: FusedMCU's time for a call of one step, over its own"
    yield _broken(f"  {_weights(report['recurrent_weights'], report['memories'])}")
    yield "  other ways to make a forward, their time for equal work over this one's"
    rows = [[f"  {name}", str(Ratio(**x))] for name, x in report["alternatives"].items()]
    yield from _table(rows)


def _sentences(title: str, sentences: Sequence[str]) -> Iterator[str]:
    if sentences:
        yield title
        yield from (_broken(f"  {sentence}") for sentence in sentences)


def _weights(size: int, memories: dict[str, int]) -> str:
    """The recurrent weights, which every step reads, beside the memories that may hold them."""
    each = ", ".join(f"{name} {_bytes(x)}" for name, x in memories.items())
    text = f"recurrent weights {_bytes(size)}, which each step reads"
    if not memories:
        return f"{text}; the sizes of the caches are not known here"
    fits = next((name for name, x in memories.items() if size <= x), None)
    return f"{text}: the first that holds them is {fits or 'the main memory'} ({each})"


def _bytes(size: int) -> str:
    for factor, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [x.rjust(width) for x, width in zip(others, widths[1:], strict=True)]
        yield f"  {first:<{widths[0]}}  {'  '.join(cells)}".rstrip()
