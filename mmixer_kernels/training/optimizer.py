"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .options import OptimizerOptions


def build(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Adam or AdamW, in which biases and norms do not decay.

    An update is one pass over the weights where PyTorch has a fused kernel: on a CPU a quarter to a
    third of the time of the other form.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_norm = name.rpartition(".")[2].startswith("norm_")
        (decaying if parameter.ndim > 1 and not is_norm else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    device = next(model.parameters()).device
    fused = device.type in ("cpu", "cuda")
    return optimizer(groups, lr=options.learning_rate, fused=fused)


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
