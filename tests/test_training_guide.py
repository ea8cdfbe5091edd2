"""docs/training.md's commands, in its order, on miniature trees: from the files to the export."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data import miniature
from markdown_blocks import blocks_of
from networks import shrink_resnets

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
BATCH = ["--epochs", "2", "--loader.batch-size", "2", "--loader.workers", "0"]
TRAIN = ["--device", "cpu", "--model.hidden-size", "8", *BATCH]
FRAMES = ["--image-size", "56", "--model.weights", "none"]
SMALLER = {
    "prepare": ["--size", "64", "--samples-per-shard", "4", "--workers", "2"],
    "train": [*TRAIN, *FRAMES],
    "train arrays": TRAIN,
    "prepare --verify": [],
}
"""What makes a command of the guide fit a miniature tree and this machine."""


OWN = "## Recordings of your own"


def commands(own: bool = False) -> list[list[str]]:
    """The commands of the section OWN, or those of all others."""
    before, _, rest = GUIDE.read_text().partition(OWN)
    section, _, after = rest.partition("\n## ")
    blocks = blocks_of(section if own else before + after, "sh")
    lines = [line for block in blocks for line in block.text.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith("pip ")]


def run(words: list[str]) -> int:
    """The exit code of a command in this folder."""
    module = next(word for word in words if word.startswith("mmixer_kernels."))
    name = module.partition(".")[2]
    arguments = words[words.index(module) + 1 :]
    for variant in ("arrays", "--verify"):
        name += f" {variant}" if variant in arguments else ""
    arguments += SMALLER.get(name, [])
    if words[0] == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        return subprocess.run([*launcher, "-m", module, *arguments], check=False).returncode
    if "--check" in arguments:  # whose counts are those of the whole set
        arguments.append("--allow-missing")
    code: int = importlib.import_module(module).main(arguments)
    return code


@pytest.mark.slow
def test_every_command_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("av", "torchvision", "onnxscript", "onnxruntime"):
        pytest.importorskip(extra)
    miniature.ntu(tmp_path / "ntu", modalities=("rgb", "depth", "ir"))
    miniature.nw_ucla(tmp_path / "nw-ucla")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) == 12
    for words in found:
        assert run(words) == 0, " ".join(words)
    for folder, samples in (("ntu60", 2), ("features", 2)):
        result = json.loads((tmp_path / "runs" / folder / "result.json").read_text())
        assert result["samples"] == samples
        assert len((tmp_path / "runs" / folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert result["processes"] == 1
    for product in ("predictions.png", "model.onnx", "runs/nw-ucla/result.json"):
        assert (tmp_path / product).stat().st_size > 0


@pytest.mark.slow
def test_every_command_for_recordings_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ("av", "torchvision", "onnxscript", "onnxruntime"):
        pytest.importorskip(extra)
    shrink_resnets(monkeypatch)
    kinds = {"rgb": ("mp4", 20), "depth": ("16-bit", 9)}
    train = ["ann/1 wave", "bob/1 wave", "ann/2 sit", "bob/2 sit"]
    lists = {"train.txt": train, "test.txt": ["eve/1 wave", "eve/2 sit"]}
    miniature.clips(tmp_path / "mine", lists, kinds)
    for modality, (kind, frames) in kinds.items():
        miniature.write_recording(tmp_path / "new" / modality / "unknown", kind, frames)
    monkeypatch.chdir(tmp_path)
    found = commands(own=True)
    assert len(found) == 6
    for words in found:
        capsys.readouterr()
        assert run(words) == 0, " ".join(words)
        if "mmixer_kernels.predict" in words:
            assert capsys.readouterr().out.startswith("unknown\nrgb+depth\n")
    run_folder = tmp_path / "runs" / "mine"
    result = json.loads((run_folder / "result.json").read_text())
    assert (result["samples"], result["classes"]) == (2, ["sit", "wave"])
    assert len(list((run_folder / "features").glob("*.npz"))) == 3
    for product in ("predictions.png", "mine.onnx"):
        assert (tmp_path / product).stat().st_size > 0


def test_the_guides_first_steps_name_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for extra in ("av", "torchvision"):
        pytest.importorskip(extra)
    damaged = "S001C001P002R001A002"
    names = miniature.ntu(tmp_path / "ntu", modalities=("rgb", "depth", "ir"))
    assert damaged in names
    miniature.spoil(tmp_path / "ntu", damaged, "rgb", "truncated")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SMALLER, "prepare", [*SMALLER["prepare"], "--workers", "1"])
    check, prepare = commands()[:2]
    assert run(check) == 1
    assert f"{damaged}_rgb.avi" in capfd.readouterr().out
    assert run(prepare) == 1
    assert f"{damaged}_rgb.avi" in capfd.readouterr().err
    assert not (tmp_path / "converted" / "index.json").exists()
