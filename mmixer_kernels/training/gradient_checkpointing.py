"""Gradient checkpointing (Chen et al., arXiv:1604.06174): what lies inside a network's blocks is
computed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def install(module: nn.Module) -> None:
    """Makes a module keep for backward the inputs of its blocks alone.

    Results, gradients, batch norm's running statistics and the draws of dropout stay the same to
    the last bit, and so do the names in its state dict.
    """
    for block in list(_blocks(module)) or [module]:
        block.forward = partial(_recomputed, block, block.forward)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with modules of their own that a Sequential or a ModuleList lines up, such as a
    ResNet's residual blocks; of nested lines the innermost, but not inside a block."""
    in_line = isinstance(module, nn.Sequential | nn.ModuleList)
    for child in module.children():
        inner = list(_blocks(child)) if not in_line or _is_line(child) else []
        if in_line and not inner and any(True for _ in child.children()):
            yield child
        yield from inner


def _is_line(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    if torch.compiler.is_compiling():
        # A compiled backward computes values again, and writes no statistics.
        return checkpoint(forward, *arguments, use_reentrant=False)
    return checkpoint(
        forward, *arguments, use_reentrant=False, context_fn=partial(_contexts, block)
    )


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first computation and of the one in backward."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Lets batch norm update copies of its running statistics, on which in training no result
    depends."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [norm._buffers for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers = {
            name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()
        }
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers = buffers
