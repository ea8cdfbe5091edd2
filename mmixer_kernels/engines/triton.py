"""The Triton engine: the whole unit without a CUDA toolkit, for any GPU that Triton compiles for.

The products with W_f, W_g, W_s and those of the weights' gradients are torch's; what stands
between them is fused, and the recurrence of all weight sets and of both directions is one launch, a
program for 16 samples of a weight set, with the weights read from L2 at each step. W_r, W_z and W_h
of all weight sets are read where they lie. A step by itself is one launch, which holds the whole
unit. A new batch or length compiles nothing.

float32 products follow `torch.set_float32_matmul_precision`, or
`torch.backends.cuda.matmul.fp32_precision`: "highest" is IEEE, else TF32.

Triton itself is imported by the first call: `import mmixer_kernels` does not bring it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step
from .protocol import EngineState

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda",)


def state(device: torch.device | None = None) -> EngineState:
    """Whether Triton is installed and torch finds a GPU."""
    return _state()


@functools.cache
def _state() -> EngineState:
    if importlib.util.find_spec("triton") is None:
        return EngineState(False, "triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        return EngineState(False, "torch finds no GPU or driver")
    import triton

    return EngineState(True, f"triton {triton.__version__}")


def saved_size(problem: Problem, keep: Keep) -> int:
    """Number of elements that `forward` leaves for `backward`: the states, with "gates" too."""
    groups, steps, batch, hidden = problem.sizes
    return 0 if keep == "nothing" else groups * steps * batch * hidden


def step(step: Step) -> Tensor:
    """One step without gradients in one launch: the next state `[B, H]`."""
    from . import triton_pass

    return triton_pass.step(step)


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    from . import triton_pass

    return triton_pass.forward(problem, keep)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    from . import triton_pass

    return triton_pass.backward(problem, saved, cotangents, need)
