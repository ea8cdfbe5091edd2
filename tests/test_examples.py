"""The programs in examples/: short, run as they are, and what they print is right."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmixer_kernels import FusedMCU, FusedMCUStack, MMixer, functional

EXAMPLES = Path(__file__).parents[1] / "examples"
PATHS = sorted(EXAMPLES.glob("*.py"))
MOST_LINES = 40

Run = Callable[[str], str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in this process, where torch is there already, and gives what it prints."""

    def printed(name: str) -> str:
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return printed


def accuracies(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(path: Path) -> None:
    first, *others = path.read_text().splitlines()
    assert len(others) < MOST_LINES
    assert re.fullmatch(rf'""".+: `python examples/{path.name}`"""', first)


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text()
    assert all(re.search(rf'"{path.stem}(.py)?"', text) for path in PATHS)


def test_both_layers_learn_in_the_same_model(run: Run) -> None:
    text = run("replace_gru")
    assert [line.split(":")[0] for line in text.splitlines()] == ["GRU", "FusedMCUStack"]
    assert min(accuracies(text)) > 60  # of 4 classes


def test_a_stream_is_the_whole_sequence(run: Run) -> None:
    assert "100 frames, one by one" in run("sensor_stream")


def test_features_in_arrays_are_learnt_and_predicted(run: Run) -> None:
    text = run("own_features")
    assert float(text.split("test accuracy ")[1].split()[0]) > 0.9  # of 3 classes
    first = [line.split() for line in text.splitlines() if re.match(r"\s*\d", line)][::3]
    assert text.splitlines()[-1].split()[4:] == [name for _, name in first]


def test_m_mixer_learns_on_two_models_that_stay_and_on_two_that_learn(run: Run) -> None:
    pytest.importorskip("torchvision")
    text = run("two_backbones")
    assert [line.split(":")[0] for line in text.splitlines()] == ["frozen", "trained along"]
    assert min(accuracies(text)) > 75  # of 4 classes, of which each model alone tells two


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
def test_an_exported_unit_needs_no_torch(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    example, unit = EXAMPLES / "onnx_without_torch.py", str(tmp_path / "unit.onnx")
    runpy.run_path(str(example))["export"](unit)  # in this process, which has torch
    code = f"import runpy; runpy.run_path({str(example)!r})['run']({unit!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "without torch: output (20, 1, 32) and h_n (1, 1, 32)" in done.stdout


@pytest.mark.slow
def test_an_export_by_another_process() -> None:
    pytest.importorskip("onnxscript")
    command = [sys.executable, str(EXAMPLES / "onnx_without_torch.py")]
    assert "without torch" in subprocess.check_output(command, text=True)


def test_dropconnect_learns(run: Run) -> None:
    assert min(accuracies(run("dropconnect"))) > 50  # of 4 classes


@pytest.fixture(scope="module")
def dropconnect() -> Any:
    return runpy.run_path(str(EXAMPLES / "dropconnect.py"))["DropConnect"]


def test_a_mask_of_each_recurrent_weight_for_each_call(dropconnect: Any) -> None:
    unit, x, context = FusedMCU(4, 3, 8), torch.randn(5, 2, 4), torch.randn(2, 3)
    dropped = dropconnect(unit, 0.4)
    for seed in (0, 1):
        torch.manual_seed(seed)
        output, _ = dropped(x, context)
        torch.manual_seed(seed)
        weights = unit.weights()
        masked = [F.dropout(w, 0.4) for w in (weights.weight_r, weights.weight_z, weights.weight_h)]
        weights = weights._replace(weight_r=masked[0], weight_z=masked[1], weight_h=masked[2])
        assert torch.equal(output, functional.mcu(x, context, weights)[0])
        unit.zero_grad()
        output.square().sum().backward()
        for name, parameter in unit.named_parameters():
            reached = parameter.grad != 0
            if name in ("weight_r", "weight_z", "weight_h"):
                assert 0 < reached.sum() < reached.numel()
                assert torch.equal(reached, getattr(weights, name) != 0), name
            else:
                assert reached.all(), name
    assert not torch.equal(dropped(x, context)[0], dropped(x, context)[0])
    torch.testing.assert_close(dropped.eval()(x, context), unit(x, context), rtol=0, atol=0)


def test_stacks_and_networks_take_it_too(dropconnect: Any) -> None:
    stack, x = FusedMCUStack(4, 0, 8, 2, bidirectional=True), torch.randn(5, 2, 4)
    dropped = dropconnect(stack, 0.4)
    before = {name: weight.clone() for name, weight in stack.state_dict().items()}
    assert not torch.equal(dropped(x)[0], dropped(x)[0])
    assert all(torch.equal(weight, before[name]) for name, weight in stack.state_dict().items())
    torch.testing.assert_close(dropped.eval()(x), stack.eval()(x), rtol=0, atol=0)
    network = MMixer((4, 4), 3, hidden_size=8)
    network.units = nn.ModuleList(dropconnect(unit, 0.4) for unit in network.units)
    features = [x.transpose(0, 1)] * 2
    assert not torch.equal(network(features), network(features))
    network.eval()
    assert torch.equal(network(features), network(features))
