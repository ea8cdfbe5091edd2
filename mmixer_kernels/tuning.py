"""Tuning the triton engine on the GPU at hand, with units of the user's sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import check_sizes
from .engines import choose, engines
from .engines.native import matmul_precision
from .engines.triton_tuning import Trial, tune
from .functional import mcu_group
from .reference import MCU

ROUNDS = 20


def tune_unit(
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_size: int = 8,
    steps: int = 16,
    weight_sets: int = 2,
) -> list[Trial]:
    """Tunes forward + backward of `weight_sets` units in one call.

    A configuration whose output or input gradient is farther from float64 than rounding explains is
    not used, however fast.

    Returns:
        The trials, the fastest, which is kept, first.

    Raises:
        ValueError: a size below 1, or tensors on `device` that the engine does not take.
        RuntimeError: the engine cannot run here, or no configuration could be used.
        OSError: the choice cannot be kept.
    """
    check_sizes(
        {
            "hidden_size": hidden_size,
            "batch_size": batch_size,
            "steps": steps,
            "weight_sets": weight_sets,
        }
    )
    state = engines()["triton"]
    if not state.available:  # before anything is put on a device that may not be there
        raise RuntimeError(f"the triton engine cannot run here: {state.reason}")
    choose("triton", torch.empty(0, dtype=dtype, device=device))
    call = _call(hidden_size, dtype, device, batch_size, steps, weight_sets)
    truth = [x.double() for x in call("reference", torch.float64)]
    bound = 64 * torch.finfo(dtype).eps
    if dtype is torch.float32 and matmul_precision() != "highest":
        bound = 2.0**-6  # TF32 keeps 11 bits of an operand

    def measure() -> float:
        for result, exact in zip(call("triton", dtype), truth, strict=True):
            error = ((result.double() - exact).norm() / exact.norm()).item()
            if not error < bound:
                raise RuntimeError(f"its relative error is {error:.1e}, more than {bound:.1e}")
        return statistics.median(_seconds(lambda: call("triton", dtype), device))

    return tune(hidden_size, dtype, device, measure)


def _call(
    hidden: int, dtype: torch.dtype, device: torch.device, batch: int, steps: int, sets: int
) -> Callable[[str, torch.dtype], tuple[Tensor, ...]]:
    """Output and gradient of the input of random units, by an engine and in a dtype."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    units = [MCU(hidden, hidden, hidden, dtype=dtype, device=device) for _ in range(sets)]
    inputs = [random(steps, batch, hidden) for _ in units]
    contexts = [random(batch, hidden) for _ in units]
    grad_output = random(sets, steps, batch, hidden)

    def call(engine: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        weights = [
            unit.weights().map(lambda x: x.detach().to(dtype).requires_grad_()) for unit in units
        ]
        output, _ = mcu_group(leaves, [x.to(dtype) for x in contexts], weights, engine=engine)
        output.backward(grad_output.to(dtype))
        gradients = [x.grad for x in leaves if x.grad is not None]
        return (output.detach(), *gradients)

    return call


def _seconds(function: Callable[[], object], device: torch.device) -> list[float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds
