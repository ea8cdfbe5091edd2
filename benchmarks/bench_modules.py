"""FusedMCU and FusedMCUCell on a CPU beside eager PyTorch and torch's own recurrent layers."""

from __future__ import annotations

import problems
import pytest
import torch
from conftest import Compare
from problems import PASSES, Size, Subject
from timing import Contender
from torch import Tensor, nn

from mmixer_kernels import FusedMCUCell, reference
from mmixer_kernels.reference import Weights

CPU = torch.device("cpu")
SIZES = [
    Size(64, 8, 512),
    Size(16, 8, 512),
    Size(64, 32, 512),
    Size(256, 1, 256),
    Size(37, 5, 384),
    Size(100, 16, 320),
    Size(64, 7, 500),
    Size(1, 1, 16),  # the host's work alone
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_fused_mcu(compare: Compare, size: Size, passes: str, threads: int) -> None:
    error = problems.check_sequence(size, "cpu", CPU, threads)
    contenders = problems.sequence_contenders(size, passes, "cpu", CPU)
    compare(f"FusedMCU, {passes}", str(size), contenders, threads=threads, error=error)


@pytest.mark.parametrize("size", [Size(1, 1, 512), Size(1, 1, 16)], ids=str)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_streaming_cell(compare: Compare, size: Size, weights: str, threads: int) -> None:
    """One step with float32 features and states, the weights in float32 or bfloat16."""
    torch.manual_seed(0)
    cell = FusedMCUCell(*[size.hidden] * 3, engine="cpu").to(getattr(torch, weights))
    gru, lstm = nn.GRUCell(size.hidden, size.hidden), nn.LSTMCell(size.hidden, size.hidden)
    input, context, hx, cx = (
        torch.randn(size.batch, size.hidden, requires_grad=True) for _ in range(4)
    )

    def truth(input: Tensor, context: Tensor, hx: Tensor, *own: Tensor) -> tuple[Tensor]:
        return (reference.mcu(input.unsqueeze(0), context, Weights(*own or cell.weights()), hx)[1],)

    def eager(input: Tensor, context: Tensor, hx: Tensor) -> Tensor:
        return reference.mcu(input.unsqueeze(0), context, cell.weights(), hx)[1]

    operands = {"input": input, "context": context, "hx": hx}
    if weights == "float32":  # gradients in bfloat16 are not exact to the tolerance
        operands |= dict(cell.named_parameters())
    error = problems.check(
        Subject(lambda input, context, hx, *_: (cell(input, context, hx),), truth, operands)
    )
    contenders = [
        Contender("FusedMCUCell", problems.Forward(cell, (input, context, hx))),
        Contender("eager reference", problems.Forward(eager, (input, context, hx))),
        Contender("nn.GRUCell", problems.Forward(gru, (input, hx))),
        Contender(
            "nn.LSTMCell",
            problems.Forward(lambda input, hx, cx: lstm(input, (hx, cx)), (input, hx, cx)),
        ),
    ]
    table = f"FusedMCUCell, one step, {weights} weights"
    compare(table, str(size), contenders, threads=threads, error=error)
