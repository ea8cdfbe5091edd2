"""The optimizer, its learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from .options import OptimizerOptions


def build(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Adam or AdamW; biases and norms do not decay."""
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
    return optimizer(groups, lr=options.learning_rate)


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


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers.

    After update t (1-based) the decay is min(decay, t / (9 + t)): a short training is averaged
    over its own length, not over the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        for mean, value in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)
