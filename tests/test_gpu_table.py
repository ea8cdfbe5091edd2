"""The table of the GPU benchmarks, from made-up results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_table


def row(kind, steps, seconds, precision="bfloat16", passes="forward", **more):
    ours = next(iter(seconds))
    settings = {"kind": kind, "steps": steps, "batch": 8, "hidden": 512, "ours": ours}
    settings |= {"precision": precision, "passes": passes, "path": "cluster"}
    return {
        "case": f"{steps}x8x512",
        "error": 3e-3,
        "settings": settings,
        "seconds": {"call": seconds, "GPU": seconds},
        "missing": {},
        **more,
    }


@pytest.fixture
def document():
    sequences = [
        row("sequence", steps, {"FusedMCU": ours, "nn.GRU": gru, "eager reference": 12 * ours})
        for steps, ours, gru in ((64, 200e-6, 900e-6), (1024, 2024e-6, 6e-3))
    ]
    group = row("group", 64, {"one call of N = 3": 1.1, "one call of N = 1": 1.0})
    missing = {"FlashRNN GRU": "ModuleNotFoundError: no flashrnn"}
    rival = row("flashrnn", 64, {"FusedMCU": 200e-6}, missing=missing)
    cpu = {"case": "64x8x512", "error": 1e-6, "settings": {}, "seconds": {}}
    return {
        "commit": "abc",
        "gpu": {"name": "made up", "driver": "1.2"},
        "versions": {"torch": "2.11"},
        "comparisons": [*sequences, group, rival, cpu],
        "failed": ["bench_cuda.py::test_path[x]"],
    }


def line(text, *words):
    (found,) = [x for x in text.splitlines() if all(word in x for word in words)]
    return found


def test_targets_are_reached_missed_or_not_measured(document):
    text = gpu_table.text([document])
    assert line(text, "forward at most 2.0 us a step").split()[-2:] == ["1.90", "reached"]
    assert line(text, ">= 4 times faster than nn.GRU", "T = 64", "forward  ").endswith("reached")
    assert line(text, ">= 4 times faster than nn.GRU", "T = 1024", "forward  ").endswith("missed")
    assert line(text, "N = 3", "T = 64", "forward  ").split()[-2:] == ["1.10", "reached"]
    eager = line(text, "eager reference", "T = 64, bfloat16, forward  ")
    assert eager.split()[-2:] == ["12.00", "missed"]
    fp32 = line(text, ">= 3 times", "T = 64, float32-high, forward  ")
    assert fp32.endswith("not measured")


def test_what_is_missing_or_failed_is_named(document):
    text = gpu_table.text([document])
    assert "FlashRNN GRU: ModuleNotFoundError" in text
    assert "bench_cuda.py::test_path[x]" in text
    assert "made up" in text
    assert "4.50x" in line(text, "64x8x512", "nn.GRU")


def test_nothing_measured():
    text = gpu_table.text([{"comparisons": []}])
    assert "reached" not in text
    assert text.count("not measured") > 10
