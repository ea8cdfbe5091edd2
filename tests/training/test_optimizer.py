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


def test_embeddings_do_not_decay() -> None:
    torchvision = pytest.importorskip("torchvision")
    for name, embeddings in (
        ("swin_t", {"relative_position_bias_table"}),
        ("vit_b_32", {"class_token", "pos_embedding"}),
    ):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        decaying, _ = optimizer.build(model, OptimizerOptions(weight_decay=0.5)).param_groups
        decay = {id(parameter) for parameter in decaying["params"]}
        assert {
            leaf.rpartition(".")[2]
            for leaf, parameter in model.named_parameters()
            if parameter.ndim > 1 and id(parameter) not in decay
        } == embeddings


def recognizer() -> nn.Module:
    extractor = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
    return nn.ModuleDict({"extractors": nn.ModuleList([extractor]), "mixer": nn.Linear(3, 2)})


def test_extractors_have_a_rate_of_their_own_on_the_same_schedule() -> None:
    model = recognizer()
    options = OptimizerOptions(
        learning_rate=1.0,
        extractor_rate=0.1,
        schedule="cosine",
        warmup_epochs=0.5,
        weight_decay=0.5,
    )
    built = optimizer.build(model, options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(x)] for x in group["params"]] for group in built.param_groups]
    assert groups == [
        ["mixer.weight"],
        ["mixer.bias"],
        ["extractors.0.0.weight"],
        ["extractors.0.0.bias", "extractors.0.1.weight", "extractors.0.1.bias"],
    ]
    assert [group["weight_decay"] for group in built.param_groups] == [0.5, 0, 0.5, 0]
    for step in range(8):
        optimizer.set_rates(built, options, step, 4, 2)
        rates = [group["lr"] for group in built.param_groups]
        assert rates[:2] == [optimizer.learning_rate(options, step, 4, 2)] * 2
        assert rates[2:] == pytest.approx([rates[0] / 10] * 2, rel=1e-12)


def test_without_a_rate_of_their_own_the_groups_are_those_of_older_checkpoints() -> None:
    model, options = recognizer(), OptimizerOptions(learning_rate=0.5)
    built = optimizer.build(model, options)
    state = built.state_dict()
    assert len(state["param_groups"]) == 2
    built.load_state_dict(state)
    optimizer.set_rates(built, options, 0, 4, 2)
    assert [group["lr"] for group in built.param_groups] == [0.5, 0.5]


def test_frozen_extractors_are_not_among_the_parameters() -> None:
    model = recognizer()
    model["extractors"].requires_grad_(False)  # type: ignore[index]
    built = optimizer.build(model, OptimizerOptions(extractor_rate=0.0, weight_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(x)] for group in built.param_groups for x in group["params"]] == [
        "mixer.weight",
        "mixer.bias",
    ]
