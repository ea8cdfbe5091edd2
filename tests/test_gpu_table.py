"""The table of what was seen on a GPU, from made-up results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_table

BOTH = "forward + backward"


def row(kind, steps, seconds, precision="bfloat16", passes="forward", sizes=(512, 8), **more):
    ours = next(iter(seconds))
    settings = {"kind": kind, "steps": steps, "hidden": sizes[0], "batch": sizes[1], "ours": ours}
    settings |= {"precision": precision, "passes": passes, "path": "cluster"}
    settings |= more.pop("settings", {})
    return {
        "case": f"{steps}x{sizes[1]}x{sizes[0]}",
        "error": 3e-3,
        "settings": settings,
        "seconds": {"call": seconds, "GPU": seconds},
        "missing": {},
        **more,
    }


def sequence(step, passes="forward", by_host=(), **more):
    """The rows of two lengths of a case with so many microseconds per step."""
    return [
        row("sequence", steps, {"FusedMCU": seconds}, passes=passes, by_host=by_host, **more)
        for steps, seconds in ((64, 1e-4), (1024, 1e-4 + 960e-6 * step))
    ]


def document(*comparisons, **more):
    result = {"commit": "abc", "gpu": {"name": "made up"}, "versions": {"torch": "2.11"}}
    return {"results": {"benchmarks": {**result, "comparisons": [*comparisons], **more}}}


def table(*comparisons, **more):
    return gpu_table.text(document(*comparisons, **more))


def line(text, *words):
    (found,) = [x for x in text.splitlines() if all(word in x for word in words)]
    return found


@pytest.mark.parametrize(
    ("step", "verdict"), [(1.5, "reached"), (1.51, "bar reached"), (1.91, "missed")]
)
def test_a_step_on_the_gpu(step, verdict):
    found = line(table(*sequence(step)), "us per step: at most 1.5 (bar 1.9)")
    assert found.split()[-1 - len(verdict.split()) :] == [f"{step:.2f}", *verdict.split()]


def test_each_step_target_has_its_own_case():
    text = table(
        *sequence(1.0),
        *sequence(4.5, BOTH),
        *sequence(1.8, sizes=(768, 16)),
        *sequence(5.2, BOTH, sizes=(768, 16)),
    )
    assert line(text, "at most 1.5 (bar 1.9)").endswith("1.00  reached")
    assert line(text, "at most 4 (bar 5)").endswith("4.50  bar reached")
    assert line(text, "published 1.96: at most 1.9", "Tx16x768").endswith("1.80  reached")
    assert line(text, "published 5.07: at most 5", "Tx16x768").endswith("5.20  missed")


def test_what_the_host_bounds_gives_no_step_and_no_verdict():
    long = sequence(1.0)[1]
    text = table(sequence(1.0, by_host=["FusedMCU"])[0], long)
    assert line(text, "us per step: at most 1.5").endswith("not measured (host)")
    assert "FusedMCU host" in line(text, "8x512", "cluster", "host", "FusedMCU host")
    assert "100 host" in line(text, "FusedMCU", "64x8x512", "3e-03")
    assert "host" not in line(text, "FusedMCU", "1024x8x512", "3e-03")
    # A baseline that the host bounds leaves our own step measured.
    other = table(sequence(1.0, by_host=["nn.GRU"])[0], long)
    assert line(other, "us per step: at most 1.5").endswith("1.00  reached")


@pytest.mark.parametrize(
    ("words", "kind", "precision", "seconds", "verdict"),
    [
        ("nn.LSTM: at least 1 ", "sequence", "float16", {"ours": 1.0, "nn.LSTM": 1.01}, "reached"),
        ("nn.LSTM: at least 1 ", "sequence", "float16", {"ours": 1.0, "nn.LSTM": 0.99}, "missed"),
        ("nn.GRU: at least 6 (bar 4)", "sequence", "bfloat16", {"o": 1, "nn.GRU": 6}, "reached"),
        ("nn.GRU: at least 6 (bar 4)", "sequence", "bfloat16", {"o": 1, "nn.GRU": 5}, "bar"),
        ("nn.GRU: at least 6 (bar 4)", "sequence", "bfloat16", {"o": 1, "nn.GRU": 3.9}, "missed"),
        ("nn.GRU: at least 6 (bar 3)", "sequence", "float32", {"o": 1, "nn.GRU": 3.9}, "bar"),
        ("nn.GRU: at least 6 (bar 3)", "sequence", "float32-high", {"o": 1, "nn.GRU": 2}, "missed"),
        ("eager reference: at least 15", "sequence", "bfloat16", {"o": 1, "x": 1}, "not measured"),
        (
            "torch.compile: at least 4",
            "compiled",
            "bfloat16",
            {"o": 1, "compiled reference": 5},
            "",
        ),
        ("FlashRNN GRU: at least 1", "flashrnn", "bfloat16", {"o": 1, "FlashRNN GRU": 2}, ""),
        ("FlashRNN LSTM: at least 1", "flashrnn", "bfloat16", {"o": 1, "FlashRNN LSTM": 2}, ""),
    ],
)
def test_a_ratio_by_call(words, kind, precision, seconds, verdict):
    verdict = {"bar": "bar reached", "": "reached"}.get(verdict, verdict)
    text = table(row(kind, 64, seconds, precision))
    found = line(text, words, f"64x8x512, {precision}, forward  ")
    assert found.endswith(f"  {verdict}")
    if kind != "compiled":
        assert line(text, words, f"1024x8x512, {precision}, {BOTH} ").endswith("  not measured")


def test_the_wide_float16_case_is_compared_to_nn_lstm():
    seconds = {"FusedMCU": 1.0, "nn.LSTM": 2.0}
    text = table(row("sequence", 1024, seconds, "float16", BOTH, sizes=(768, 16)))
    assert line(text, "nn.LSTM: at", "1024x16x768, float16", BOTH).endswith("2.00  reached")
    assert line(text, "nn.LSTM: at", "1024x8x512, float16", BOTH).endswith("not measured")


def test_three_modalities_cost_little_more_than_one():
    for three, verdict in ((1.2, "reached"), (1.21, "missed")):
        text = table(row("group", 64, {"one call of N = 3": three, "one call of N = 1": 1.0}))
        assert line(text, "N = 3 over", "64x8x512, bfloat16, forward  ").endswith(f"  {verdict}")


def test_the_papers_calls_are_compared_by_their_number():
    rows = [
        row(
            "paper",
            steps,
            {"mcu_group": 1.0, "nn.GRU": ratio, "nn.LSTM": 3.0},
            settings={"modalities": modalities},
        )
        for modalities, ratio in ((1, 0.9), (3, 2.0))
        for steps in (9, 13)
    ]
    text = table(*rows)
    assert line(text, "N calls of nn.GRU", "N = 1, bfloat16, forward  ").endswith("0.90  missed")
    assert line(text, "N calls of nn.GRU", "N = 2, bfloat16, forward  ").endswith("not measured")
    assert line(text, "N calls of nn.GRU", "N = 3, bfloat16, forward  ").endswith("2.00  reached")
    assert "the slope" not in text  # of four steps


def test_times_have_the_interval_the_clock_on_the_gpu_and_what_the_host_bounds():
    ratios = {"nn.GRU": {"of_medians": 0.25, "low": 0.2, "high": 0.4}}
    text = table(row("sequence", 64, {"FusedMCU": 1e-4, "nn.GRU": 4e-4}, ratios=ratios))
    assert "nn.GRU 4.00x [2.50-5.00] (4.00x)" in text
    marked = table(row("sequence", 64, {"FusedMCU": 1e-4, "nn.GRU": 4e-4}, by_host=["nn.GRU"]))
    assert "nn.GRU 4.00x (4.00x host)" in marked


def test_the_hosts_part_of_a_call_is_beside_it():
    times = {"FusedMCU": 1e-4, "nn.GRU": 4e-4}
    both = {"call": times, "host": {"FusedMCU": 6.6e-5, "nn.GRU": 3.3e-5}}
    text = table({**row("sequence", 9, times), "seconds": both})
    assert line(text, "9x8x512", "FusedMCU").split()[5:7] == ["100", "66"]
    assert "nn.GRU 4.00x, returns 0.50x" in text


def test_kernels_of_a_recurrence_are_named_shortly():
    kernels = {
        "nn.GRU": {
            "void cudnn::rnn::RNN_blockPersist_fp_GRU<__half, float, (Type)1>(Params)": 1,
            "void RNN_blockPersist_fp_GRU<float>(Params)": 2,
            "void (anonymous namespace)::gemm<float>(Params)": 4,
        },
        "nn.LSTM": {"sm90_gemm": 128},
    }
    text = table({"table": "Kernels, x", "case": "64x8x512", "kernels": kernels})
    assert line(text, "nn.GRU", "Kernels, x").split()[-3:] == ["7", "3", "RNN_blockPersist_fp_GRU"]
    assert line(text, "nn.LSTM", "Kernels, x").split()[-2:] == ["128", "none"]


def test_comparisons_without_a_gpus_clock_are_listed():
    ratios = {"nn.GRU": {"of_medians": 0.5, "low": 0.4, "high": 0.6}}
    text = table({"table": "M-Mixer", "case": "16x8x512", "ratios": ratios, "settings": {}})
    assert line(text, "M-Mixer").endswith("nn.GRU 0.50 (0.40-0.60)")


def test_what_is_missing_or_failed_is_named():
    missing = {"FlashRNN GRU": "ModuleNotFoundError: no flashrnn"}
    text = table(row("flashrnn", 64, {"FusedMCU": 1.0}, missing=missing), failed=["test_path[x]"])
    assert "FlashRNN GRU: ModuleNotFoundError" in text
    assert "test_path[x]" in text
    assert "made up" in text


@pytest.mark.parametrize(
    "nothing",
    [{}, {"results": {}, "probe": [], "parts": {}, "left out": {}}, document(), {"results": None}],
)
def test_nothing_measured(nothing):
    text = gpu_table.text(nothing)
    assert "reached" not in text
    assert text.count("not measured") > 40
    assert "commit" in text


PROBE = [
    {"kind": "device", "name": "H100 of the probe", "capability": "9.0", "l2_mib": 50},
    {"kind": "clusters", "size": 16, "at_once": 8, "why": "so many fit"},
    {"kind": "teams", "path": "cluster", "direction": "forward", "hidden": 512, "teams": 7},
    {"kind": "exchange", "what": "all-gather", "wait": "acquire.cluster", "bytes": 8192, "ns": 431},
    {"kind": "l2", "what": "one-way", "cycles": 777, "ns": 400.123456},
    {"kind": "launch", "what": "cooperative", "us": 5.5},
    {"kind": "cell", "hidden": 513, "context": 0, "batch": 1, "us": 6.25},
    {"kind": "hang", "path": "step", "direction": "backward", "hidden": 128, "terms": 3},
    {"kind": "error", "what": "no kernel image"},
    {"kind": "novel", "depth": [1, 2]},
    {"no": "kind"},
    "a line of its own",
]


def kernel(path, step, **more):
    record = {"kind": "kernel", "path": path, "direction": "forward", "hidden": 512, "terms": 1}
    record |= {"term_dtype": "bfloat16", "samples": 8, "teams": 1, "us_per_step": step}
    return {**record, "not_finite": 0, "differ": 0, **more}


def test_the_probes_records_and_the_parts_without_any_result():
    text = gpu_table.text(
        {
            "commit": "abc",
            "gpu": "NVIDIA H100, 9.0",
            "parts": {
                "build": {"verdict": "passed", "seconds": 61.25, "passed": 0, "skipped": 3},
                "tests": {},
            },
            "left out": {"cluster": "forward 512 did not end"},
            "probe": [*PROBE, kernel("cooperative", 3.5), kernel("cluster", 1.85, surprise="new")],
        }
    )
    assert line(text, "GPU", "NVIDIA H100, 9.0")
    assert line(text, "build").split() == ["build", "61.25", "0", "3", "passed"]
    assert line(text, "cluster: forward 512 did not end")
    assert "H100 of the probe" in text
    assert line(text, "so many fit").split()[:2] == ["16", "8"]
    assert line(text, "all-gather").split() == ["all-gather", "acquire.cluster", "8192", "431"]
    assert line(text, "one-way", "777").split() == ["one-way", "777", "400.1"]
    assert line(text, "cooperative", "5.5").split() == ["cooperative", "5.5"]
    assert line(text, "513", "6.25")
    assert line(text, "step", "backward", "128", "3")
    assert "no kernel image" in text
    assert '{"kind": "novel", "depth": [1, 2]}' in text
    assert '{"no": "kind"}' in text
    assert '"a line of its own"' in text
    assert line(text, "1.85", "new")
    target = line(text, "us per step: at most 1.5")
    assert target.endswith("1.85 by the probe (cluster, teams: 1 of 8 samples)  not measured")
    assert line(text, "us per step: at most 4").endswith("not measured")
    assert "by the probe" not in line(text, "us per step: at most 4")
    assert "by the probe" not in line(text, "at most 1.9", "Tx16x768")


def test_a_kernel_with_wrong_numbers_counts_for_nothing():
    wrong = [kernel("cluster", 1.0, differ=1), kernel("cluster", 1.1, not_finite=2)]
    wrong += [kernel("cluster", 0.9, terms=2), kernel("cluster", 0.8, direction="backward")]
    wrong += [kernel("cluster", 0.7, term_dtype="float16"), kernel("cluster", None)]
    text = gpu_table.text({"probe": wrong})
    assert "by the probe (" not in text
    right = gpu_table.text({"probe": [*wrong, kernel("cooperative", 3.3)]})
    assert "3.30 by the probe (cooperative" in right


def test_variants_of_the_probes_kernels_beside_what_they_are_variants_of():
    text = gpu_table.text(
        {
            "probe": [
                kernel("cluster", 2.0),
                kernel("cluster", 1.6, samples=4),
                kernel("cluster", 9.0, hidden=256, samples=4),  # beside nothing
                kernel("cooperative", 3.0),
                kernel("cooperative", 3.3, samples=4),
                kernel("wide", 2.4),
                kernel("wide", 2.2, samples=4),
                kernel("wide", 1.0, hidden=128, differ=1),  # of wrong numbers
                kernel("cooperative", 2.0, hidden=128),
            ]
        }
    )
    section = text[text.index("Variants of the recurrence's kernels") :].split("\n\n")[0]
    assert section.count("\n") == 1 + 4
    assert line(section, "cluster").endswith("8 samples 1.25x")
    assert line(section, "cooperative  forward").endswith("8 samples 0.91x")
    assert line(section, "wide", " 8  ").endswith("  cooperative 1.25x")
    assert line(section, "wide", " 4  ").endswith("8 samples 1.09x; cooperative 1.50x")


def test_variants_are_compared_by_their_ratio():
    text = table(
        row("samples", 64, {"teams of 4": 1e-4, "teams of 8": 1.5e-4}),
        row("samples", 1024, {"teams of 4": 1.3e-3, "teams of 8": 2e-3}),
        row("packets", 64, {"wide": 1e-4, "cooperative": 8e-5}),
        row("packets", 1024, {"wide": 2e-3, "cooperative": 3e-3}),
    )
    assert line(text, "teams of 4", "64x8x512").endswith("teams of 8 1.50x (1.50x)")
    assert line(text, "8x512", "teams of 4 1.25; teams of 8 1.93")
    assert line(text, "wide", "1024x8x512").endswith("cooperative 1.50x (1.50x)")
    assert line(text, "wide: latency of the exchanges through L2")


def test_torchs_number_comes_before_the_probes():
    text = gpu_table.text({**document(*sequence(2.0)), "probe": [kernel("cluster", 1.0)]})
    assert line(text, "us per step: at most 1.5").endswith("2.00  missed")


def test_the_command_takes_a_document_or_files_of_results(tmp_path, capsys):
    whole, part, other = (tmp_path / f"{name}.json" for name in ("whole", "part", "other"))
    content = document(*sequence(1.0))
    whole.write_text(json.dumps({**content, "parts": {"tests": {"verdict": "passed"}}}))
    part.write_text(json.dumps(content["results"]["benchmarks"]))
    other.write_text(json.dumps({"comparisons": [], "failed": ["test_of_the_other"]}))
    gpu_table.main([str(whole)])
    assert "passed" in (first := capsys.readouterr().out)
    assert line(first, "us per step: at most 1.5").endswith("1.00  reached")
    gpu_table.main([str(part), str(other)])
    assert "test_of_the_other" in (second := capsys.readouterr().out)
    assert line(second, "us per step: at most 1.5").endswith("1.00  reached")
    with pytest.raises(SystemExit):
        gpu_table.main([str(whole), str(part)])
    assert "FILE must be" in capsys.readouterr().err


def test_a_damaged_number_costs_its_section_and_no_other():
    ratios = {"nn.GRU": {"of_medians": 0.1, "low": 0, "high": 0}}
    times = {"FusedMCU": 1e-4, "nn.GRU": 1e-3}
    text = gpu_table.text(
        {**document(row("sequence", 64, times, ratios=ratios)), "left out": {"cell": "why"}}
    )
    assert "no section times: ZeroDivisionError" in text
    assert "cell: why" in text
    assert line(text, "as fast as nn.GRU", " 64x8x512, bfloat16, forward  ").endswith("  reached")
    text = table(row("sequence", 64, {**times, "FusedMCU": float("nan")}))
    assert line(text, "as fast as nn.GRU", " 64x8x512, bfloat16, forward  ").endswith(
        "not measured"
    )
