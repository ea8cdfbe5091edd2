"""The formulas of FlopCounterMode against what it counts of plain PyTorch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmixer_kernels import FusedMCU, FusedMCUStack
from mmixer_kernels.reference import MCU


def count(unit, input, context):
    with FlopCounterMode(display=False) as counter:
        unit(input, context)[0].sum().backward()
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_and_backward(of_input, frozen):
    """The equations make each product of one step once, as the engines do."""
    if frozen and not of_input:
        return
    input, context = torch.randn(1, 5, 3, requires_grad=of_input), torch.randn(5, 2)
    units = [unit(3, 2, 4).requires_grad_(not frozen) for unit in (FusedMCU, MCU)]
    context.requires_grad_()
    ours, plain = (sum(count(unit, input, context).values()) for unit in units)
    assert ours == plain


def test_each_step_counts():
    unit, steps, batch = FusedMCU(3, 2, 4), 7, 5
    counts = count(unit, torch.randn(steps, batch, 3), torch.randn(batch, 2))
    of_steps = 2 * steps * batch * (4 * 3 + 4 * 4 + 3 * 4 * 4)
    once = 2 * batch * (4 * 2 + 4 * 4)
    assert counts[torch.ops.mmixer_kernels.mcu_forward] == of_steps + once


def test_each_layer_and_direction_counts_without_context():
    unit, steps, batch = FusedMCUStack(3, 0, 4, 2, bidirectional=True), 7, 5
    forward, backward = count(unit, torch.randn(steps, batch, 3), None).values()
    layers = (4 * 3 + 3 * 4 * 4, 4 * 8 + 3 * 4 * 4)
    assert forward == 2 * 2 * steps * batch * sum(layers)
    assert backward == 2 * forward - 2 * 2 * steps * batch * 4 * 3  # no gradient of the input


@pytest.mark.parametrize("options", [{"recompute": True}, {"engine": "reference"}])
def test_what_is_computed_again_counts(options):
    operands = torch.randn(7, 5, 3), torch.randn(5, 2)
    once, twice = (
        count(FusedMCU(3, 2, 4), *operands),
        count(FusedMCU(3, 2, 4, **options), *operands),
    )
    backward, forward = torch.ops.mmixer_kernels.mcu_backward, torch.ops.mmixer_kernels.mcu_forward
    assert twice[backward] == once[backward] + once[forward]


def test_a_counter_that_sees_the_backward_alone():
    unit = FusedMCU(3, 2, 4)
    loss = unit(torch.randn(7, 5, 3), torch.randn(5, 2))[0].sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() > 0
