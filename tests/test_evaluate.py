from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmixer_kernels import FusedMCU, evaluate, export, extract, predict
from mmixer_kernels.trained.quantized import Stepped
from mmixer_kernels.training import checkpoint

NUMBERS = (
    *("accuracy", "mean_class_accuracy", "per_class_accuracy", "confusion", "loss", "samples"),
    "classes",
)


def test_it_repeats_the_result_to_the_last_digit(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((tiny_run / "result.json").read_text())
    file = tmp_path / "report.json"
    assert evaluate.main([str(tiny_run / "best.pt"), "--output", str(file)]) == 0
    report = json.loads(file.read_text())
    assert {name: report[name] for name in NUMBERS} == {name: result[name] for name in NUMBERS}
    assert (report["split"], report["epoch"]) == ("test", result["epoch"])
    assert f"test: accuracy {result['accuracy']:.2%}" in capsys.readouterr().out


def test_validation_repeats_the_records_of_both_checkpoints(tiny_run: Path, tmp_path: Path) -> None:
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines()
    file = tmp_path / "report.json"
    for name in ("best.pt", "last.pt"):
        arguments = [str(tiny_run / name), "--split", "validation", "--output", str(file)]
        assert evaluate.main(arguments) == 0
        report = json.loads(file.read_text())
        record = json.loads(lines[report["epoch"] - 1])
        for number in ("accuracy", "mean_class_accuracy", "loss"):
            assert report[number] == record[f"validation_{number}"]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_other_batch_sizes_count_the_same_samples(
    tiny_run: Path, tmp_path: Path, batch_size: int
) -> None:
    file = tmp_path / "report.json"
    arguments = ["--batch-size", str(batch_size), "--workers", "1", "--output", str(file)]
    assert evaluate.main([str(tiny_run / "best.pt"), *arguments]) == 0
    report, result = (json.loads(p.read_text()) for p in (file, tiny_run / "result.json"))
    rows = [sum(row) for row in report["confusion"]]
    assert rows == [sum(row) for row in result["confusion"]]
    assert report["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_quantized_tells_the_accuracy_with_int8_weights(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    arguments = [str(tiny_run / "best.pt"), "--quantized", "--device", "cpu", "--output", str(file)]
    assert evaluate.main(arguments) == 0
    report = json.loads(file.read_text())
    found = report["quantized"]
    assert 0 < abs(found["loss"] - report["loss"]) < 0.05
    assert f"with int8 weights: accuracy {found['accuracy']:.2%}" in capsys.readouterr().out


def test_a_cell_goes_through_sequences_as_a_unit_does() -> None:
    unit = FusedMCU(5, 7, 9)
    input, context, lengths = torch.randn(4, 3, 5), torch.randn(3, 7), torch.tensor([4, 1, 3])
    with torch.no_grad():
        expected = unit(input, context, lengths=lengths)
    results = Stepped(unit.quantized())(input, context, lengths=lengths)
    torch.testing.assert_close(results, expected, atol=0.1, rtol=0)
    assert torch.equal(results[0] == 0, expected[0] == 0)
    assert torch.equal(results[0][lengths - 1, torch.arange(3)], results[1][0])


@pytest.mark.slow
def test_missing_tells_each_modality_and_repeats_in_two_processes(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    arguments = [str(tiny_run / "best.pt"), "--missing", "--output"]
    assert evaluate.main([*arguments, str(ours)]) == 0
    report = json.loads(ours.read_text())
    last = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[-2:]}
    assert list(report["missing"]) == list(last) == ["rgb", "depth"]
    for modality, cases in report["missing"].items():
        assert list(cases) == ["absent", "noise"]
        summaries = [report, cases["absent"], *cases["noise"].values()]
        shown = [f"{summary['accuracy']:.2%}" for summary in summaries]
        assert last[modality].split()[1:] == shown
        assert len({summary["loss"] for summary in summaries}) == 5
    torchrun = [*(sys.executable, "-m", "torch.distributed.run"), "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "mmixer_kernels.evaluate", *arguments, str(theirs), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(theirs.read_text()) == report


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpus_checkpoint_goes_to_the_cpu_in_every_command(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(tiny_run / "best.pt")
    state["config"]["device"] = "cuda:1"
    state["config"]["model"] |= {"engine": "triton", "sync_batch_norm": True}
    path = tmp_path / "best.pt"
    checkpoint.save(state, path)
    result = json.loads((tiny_run / "result.json").read_text())
    for device in (["--device", "cpu"], []):
        file = tmp_path / "report.json"
        assert evaluate.main([str(path), "--output", str(file), *device]) == 0
        report, notes = json.loads(file.read_text()), capsys.readouterr().err
        assert {name: report[name] for name in NUMBERS} == {n: result[n] for n in NUMBERS}
        assert (report["device"], report["engine"]) == ("cpu", result["engine"])
        assert "with --model.engine triton" in notes
        assert ("with --device cuda:1" in notes) == (not device)
    assert evaluate.main([str(path), "--device", "cuda"]) == 2
    assert "error: --device cuda cannot be used here" in capsys.readouterr().err
    picture = ["--index", "0", "--output", str(tmp_path / "p.png")]
    assert predict.main([str(path), *picture]) == 0
    assert extract.main([str(path), "--output", str(tmp_path / "features")]) == 0
    assert export.main([str(path), "--output", str(tmp_path / "model.pt2")]) == 0


def test_mistakes_end_in_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    other = checkpoint.load(tiny_run / "best.pt")
    other["data"]["classes"][0] = "something else"
    checkpoint.save(other, tmp_path / "other.pt")
    for arguments, message in (
        ([str(tmp_path / "missing.pt")], "missing.pt is not a file"),
        ([str(tmp_path / "missing" / "best.pt"), "--streams"], "missing/best.pt is not a file"),
        ([str(broken)], "broken.pt is damaged"),
        ([str(tmp_path / "other.pt")], "classes was ['something else'"),
        ([str(tiny_run / "best.pt"), "--root", "somewhere"], "root"),
        ([str(tiny_run / "best.pt"), "--batch-size", "0"], "--loader.batch-size must be 1"),
    ):
        assert evaluate.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert message in error


def test_evaluation_does_not_depend_on_the_random_state(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate.main([str(tiny_run / "best.pt"), "--output", str(file)]) == 0
        result = json.loads((tiny_run / "result.json").read_text())
        assert json.loads(file.read_text())["loss"] == result["loss"]
