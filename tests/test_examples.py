"""The programs in examples/."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmixer_kernels import FusedMCU, FusedMCUStack, MMixer, functional

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_it_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.slow
def test_m_mixer_learns_on_two_models_that_stay_and_on_two_that_learn() -> None:
    pytest.importorskip("torchvision")
    example = runpy.run_path(str(EXAMPLES / "two_backbones.py"))
    torch.manual_seed(0)
    chance = 1 / example["CLASSES"]
    assert example["frozen"]() > 3 * chance
    assert example["joint"]() > 3 * chance


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
