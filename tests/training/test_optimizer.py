from __future__ import annotations

import pytest
import torch
from torch import nn

from mmixer_kernels import FusedMCU
from mmixer_kernels.training import optimizer
from mmixer_kernels.training.options import OptimizerOptions


def test_learning_rate_warms_up_and_stays() -> None:
    options = OptimizerOptions(learning_rate=1.0, warmup_epochs=0.5)
    rates = [optimizer.learning_rate(options, step, 8, 2) for step in range(16)]
    assert rates == [0.25, 0.5, 0.75, *[1.0] * 13]


def test_cosine_falls_from_the_full_rate_towards_0() -> None:
    options = OptimizerOptions(learning_rate=2.0, schedule="cosine", warmup_epochs=1)
    rates = [optimizer.learning_rate(options, step, 4, 3) for step in range(12)]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert 0 < rates[11] < 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_warmup_may_be_as_long_as_the_training() -> None:
    options = OptimizerOptions(learning_rate=1.0, schedule="cosine", warmup_epochs=2)
    assert [optimizer.learning_rate(options, step, 2, 2) for step in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.ModuleDict({"unit": FusedMCU(2, 2, 3), "head": nn.Linear(3, 2)})
    built = optimizer.build(model, OptimizerOptions(name="adamw", weight_decay=0.5))
    assert isinstance(built, torch.optim.AdamW)
    decaying, others = built.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decaying["weight_decay"] == 0.5
    assert others["weight_decay"] == 0
    assert {names[id(parameter)] for parameter in others["params"]} == {
        "unit.norm_weight",
        "unit.norm_bias",
        "head.bias",
    }
    assert len(decaying["params"]) + len(others["params"]) == len(names)
