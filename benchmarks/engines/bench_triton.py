"""The triton engine beside the cuda engine, torch's recurrent layers and the eager reference; the
prologue's share of a call; and one streaming step, by itself and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from conftest import Compare
from problems import Size

from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell, engines, reference
from mmixer_kernels.comparison.passes import PASSES, Forward
from mmixer_kernels.comparison.timing import Contender
from mmixer_kernels.problem import Problem

STATES = {name: engines()[name] for name in ("cuda", "triton")}
AVAILABLE = [name for name, state in STATES.items() if state.available]
pytestmark = pytest.mark.skipif("triton" not in AVAILABLE, reason=STATES["triton"].reason)

GPU = torch.device("cuda")
DTYPE, TOLERANCE = torch.bfloat16, 5e-2
HIDDEN = 512
SIZES = [Size(64, 8, 512), Size(16, 8, 512), Size(64, 8, 128), Size(64, 8, 1024), Size(64, 64, 512)]


def _settings(kind: str, size: Size, passes: str) -> dict[str, Any]:
    return {"kind": kind, **size._asdict(), "precision": "bfloat16", "passes": passes}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sequence(compare_on_gpu: Compare, size: Size, passes: str) -> None:
    error = problems.check_sequence(size, "triton", GPU, 1, DTYPE, TOLERANCE)
    every = problems.sequence_contenders(size, passes, "triton", GPU, DTYPE)
    contenders = [every[0]._replace(name="triton"), *every[1:]]
    missing = {}
    if "cuda" in AVAILABLE:
        problems.check_sequence(size, "cuda", GPU, 1, DTYPE, TOLERANCE)
        ours = problems.sequence_contenders(size, passes, "cuda", GPU, DTYPE)[0]
        contenders.insert(1, ours._replace(name="cuda"))
    else:
        missing["cuda"] = STATES["cuda"].reason
    compare_on_gpu(
        f"Engine triton, bfloat16, {passes}",
        str(size),
        contenders,
        error=error,
        settings=_settings("triton", size, passes),
        on_gpu=["triton", "cuda", "nn.GRU", "nn.LSTM"],
        missing=missing,
    )


@pytest.mark.parametrize("steps", [8, 16, 64, 512])
def test_share_of_the_prologue(compare_on_gpu: Compare, steps: int) -> None:
    """Eq. 7-10 and the input gates beside the whole call: T B = 64, 128, 512, 4096."""
    from mmixer_kernels.engines.triton_pass import Pass

    size = Size(steps, 8, HIDDEN)
    error = problems.check_sequence(size, "triton", GPU, 1, DTYPE, TOLERANCE)
    unit = FusedMCU(*[HIDDEN] * 3, engine="triton", device=GPU, dtype=DTYPE)
    operands = [x.detach() for x in problems.sequence_operands(size, GPU, DTYPE)]

    def prologue(input: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return Pass(Problem([input], [context], [unit.weights()])).prologue().input_gates

    compare_on_gpu(
        "Prologue beside the whole forward, engine triton, bfloat16",
        str(size),
        [
            Contender("prologue", Forward(prologue, operands)),
            Contender("FusedMCU", Forward(unit, operands)),
        ],
        error=error,
        settings=_settings("prologue, triton", size, "forward"),
        on_gpu=["prologue", "FusedMCU"],
        missing={},
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("engine", AVAILABLE or [""])
def test_step(compare_on_gpu: Compare, engine: str, batch: int) -> None:
    torch.manual_seed(0)
    size = Size(1, batch, HIDDEN)
    cell = FusedMCUCell(*[HIDDEN] * 3, engine=engine, device=GPU, dtype=DTYPE)
    gru = torch.nn.GRUCell(HIDDEN, HIDDEN, device=GPU, dtype=DTYPE)
    input, context, hx = (torch.randn(batch, HIDDEN, device=GPU, dtype=DTYPE) for _ in range(3))

    def eager(input: torch.Tensor, context: torch.Tensor, hx: torch.Tensor) -> torch.Tensor:
        return reference.mcu(input.unsqueeze(0), context, cell.weights(), hx)[1]

    with torch.no_grad():
        weights = cell.weights().map(torch.Tensor.double)
        doubles = (x.double() for x in (input.unsqueeze(0), context))
        truth = reference.mcu(*doubles, weights, hx.double())[1]
        error = ((cell(input, context, hx) - truth).norm() / truth.norm()).item()
    assert error < TOLERANCE, f"the step's relative error is {error}: no timing"
    compare_on_gpu(
        f"One step, engine {engine}, bfloat16",
        str(size),
        [
            Contender("FusedMCUCell", Forward(cell, (input, context, hx))),
            Contender("CellStream", Forward(CellStream(cell, context, hx), (input,))),
            Contender("eager reference", Forward(eager, (input, context, hx))),
            Contender("nn.GRUCell", Forward(gru, (input, hx))),
        ],
        error=error,
        settings=_settings(f"cell, {engine}", size, "forward"),
        on_gpu=["FusedMCUCell", "CellStream", "nn.GRUCell"],
        missing={},
    )
