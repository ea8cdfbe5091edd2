"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .options import OptimizerOptions


def build(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Adam or AdamW, in which biases, norms and embeddings do not decay, on the parameters that are
    trained; a Recognizer's extractors have `extractor_rate` where there is one.

    An update is one pass over the weights where PyTorch has a fused kernel, which takes a quarter
    to a third of the other form's time on a CPU.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    own = [
        (name, weight)
        for name, weight in trained
        if options.extractor_rate is not None and name.startswith("extractors.")
    ]
    names = {name for name, _ in own}
    groups = _groups([pair for pair in trained if pair[0] not in names], options)
    if own:
        groups += [
            {**group, "initial_lr": options.extractor_rate} for group in _groups(own, options)
        ]
    optimizer = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    device = next(model.parameters()).device
    fused = device.type in ("cpu", "cuda")
    return optimizer(groups, lr=options.learning_rate, fused=fused)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes an optimizer's `state_dict`, of another form of its update too: versions before wrote
    one that is not fused, to which a GradScaler would not tell that gradients overflowed."""
    fused = optimizer.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_rates(
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
    step: int,
    steps_per_epoch: int,
    epochs: int,
) -> None:
    """Gives every group of parameters its rate of a step, as `learning_rate` has it."""
    for group in optimizer.param_groups:
        peak = group.get("initial_lr", options.learning_rate)
        group["lr"] = learning_rate(
            replace(options, learning_rate=peak), step, steps_per_epoch, epochs
        )


def learning_rate(options: OptimizerOptions, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of a step of the whole training, 0-based.

    It rises linearly over `warmup_epochs`, then stays, or falls to 0 by a half cosine.
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.schedule == "constant":
        return options.learning_rate
    passed = (step - warmup) / (epochs * steps_per_epoch - warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))


def _groups(
    named: Sequence[tuple[str, nn.Parameter]], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """The parameters that decay, and the others."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        leaf = name.rpartition(".")[2]
        # Embeddings, such as Swin's relative_position_bias_table, are matrices of other names.
        is_matrix = parameter.ndim > 1 and "weight" in leaf and not leaf.startswith("norm_")
        (decaying if is_matrix else others).append(parameter)
    return [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
