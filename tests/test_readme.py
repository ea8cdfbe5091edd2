"""README.md: every block runs, every link leads somewhere, and its length; and docs/units.md, where
`nn.GRU`'s arguments are."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from building import SEARCH
from data import miniature
from markdown_blocks import blocks, run_python
from networks import shrink_resnets
from torch import nn

from mmixer_kernels import FusedMCUCell, FusedMCUStack

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EPOCH = ["--device", "cpu", "--epochs", "1"]
SMALL = [*EPOCH, "--model.hidden-size", "8", "--loader.batch-size", "4"]
SMALLER = {
    "train": EPOCH,
    "train --data arrays": SMALL,
    "train --data clips": [*SMALL, "--image-size", "56", "--model.weights", "none"],
}
"""What makes a command of README fit a test: fewer epochs, and a network for few samples."""


def commands(block: int) -> list[list[str]]:
    """The words of each line of a block of commands, without comments."""
    return [shlex.split(x, comments=True) for x in blocks(README, "sh")[block].text.splitlines()]


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_its_python() -> None:
    names = run_python(README)
    assert names["output"].shape == (64, 8, 512)
    assert names["logits"].shape == (8, 60)


def test_its_links() -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_its_blocks_are_those_that_are_run_here() -> None:
    assert len(re.findall("^ *```", README.read_text(), re.MULTILINE)) == 2 * (1 + 2)
    assert (len(blocks(README, "python")), len(blocks(README, "sh"))) == (1, 2)


@pytest.mark.slow
def test_its_installation(tmp_path: Path) -> None:
    """The first block, in a copy of the repository, as it stands. torch and the tools of the build
    come from this environment, and the engine is built for the baseline alone, without CUDA."""
    if not (shutil.which("cmake", path=SEARCH) and shutil.which("ninja", path=SEARCH)):
        pytest.skip("needs cmake and ninja")
    pytest.importorskip("pybind11")
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".*", "build", "*.so", "results", "runs")
    shutil.copytree(ROOT, copy, ignore=skipped)
    environment = {
        **os.environ,
        "PATH": SEARCH,
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_BUILD_ISOLATION": "false",  # which means that there is none
        "MMIXER_CUDA": "OFF",
        "MMIXER_SETS": "baseline",
    }
    script = "set -e\n" + blocks(README, "sh")[0].text
    result = subprocess.run(
        ["bash", "-c", script], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"cpu +available", result.stdout)
    assert list((copy / ".venv").rglob("mmixer_kernels/_native*.so"))


@pytest.mark.slow
def test_its_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block, in its order, on features and recordings that are made here."""
    for extra in ("av", "torchvision", "onnxscript", "onnxruntime"):
        pytest.importorskip(extra)
    shrink_resnets(monkeypatch)
    (tmp_path / "features").mkdir()
    random = np.random.default_rng(0)
    for split, samples in (("train", 24), ("test", 8)):
        arrays = {x: random.standard_normal((samples, 5, 3)) for x in ("skeleton", "audio")}
        path = tmp_path / "features" / f"{split}.npz"
        np.savez(path, label=np.arange(samples) % 2, **arrays)
    names = [f"{name}/{n} {label}" for name in ("ann", "bob") for n, label in ((1, 0), (2, 1))]
    lists = {"train.txt": names, "test.txt": ["eve/1 0", "eve/2 1"]}
    miniature.clips(tmp_path / "recordings", lists, {"rgb": ("mp4", 20), "depth": ("16-bit", 9)})
    monkeypatch.chdir(tmp_path)
    found = commands(1)
    assert len(found) == 6
    for words in found:
        assert words[:2] == ["python", "-m"], words
        module, arguments = words[2], words[3:]
        name = " ".join([module.partition(".")[2], *arguments[:2]])
        assert importlib.import_module(module).main([*arguments, *SMALLER.get(name, [])]) == 0
    for product in ("scores.csv", "model.onnx", "runs/arrays-0/result.json"):
        assert (tmp_path / product).stat().st_size > 0


def test_the_table_for_users_of_a_gru_has_every_argument() -> None:
    page = (ROOT / "docs" / "units.md").read_text()
    section = page.split("## If you come from nn.GRU")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    of_gru, ours = (set(re.findall(r"\w+", " ".join(column))) for column in zip(*rows, strict=True))
    for argument in inspect.signature(nn.RNNBase.__init__).parameters:
        if argument not in ("self", "mode", "proj_size"):  # the last is nn.LSTM's
            assert argument in of_gru, argument
    for kind in (FusedMCUStack, FusedMCUCell):
        for argument in inspect.signature(kind).parameters:
            assert argument in ours | of_gru, argument
    for name in (*FusedMCUStack(1, 1, 1).state_dict(), "FusedMCUCell"):
        assert name in ours | {"weight_g_l0", "weight_s_l0"}, name
