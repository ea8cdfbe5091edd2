"""`FusedMCU` and `FusedMCUCell` as modules."""

import copy
import doctest
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from mmixer_kernels import FusedMCU, FusedMCUCell, modules, network
from mmixer_kernels.reference import MCU


def test_examples_in_docstrings():
    for module in (modules, network):
        result = doctest.testmod(module, extraglobs={"torch": torch})
        assert result.attempted
        assert not result.failed


@pytest.mark.parametrize("options", [{}, {"layer_norm": False}, {"mix": "concat"}])
def test_state_dicts_move_both_ways(options):
    fused, plain, cell = (kind(3, 4, 5, **options) for kind in (FusedMCU, MCU, FusedMCUCell))
    plain.load_state_dict(fused.state_dict(), strict=True)
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    torch.testing.assert_close(fused(x, c), plain(x, c))
    other = MCU(3, 4, 5, **options)
    fused.load_state_dict(other.state_dict(), strict=True)
    cell.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(fused(x, c), other(x, c))


def test_layouts_agree_with_the_reference():
    lengths = torch.tensor([2, 6, 2, 5])
    fused, plain = FusedMCU(3, 4, 5), MCU(3, 4, 5)
    plain.load_state_dict(fused.state_dict())
    x, c, h = torch.randn(6, 4, 3), torch.randn(4, 4), torch.randn(1, 4, 5)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for arguments in (
        (x, c),
        (x, c, h),
        (x, c, h, lengths),
        (x[:, 0], c[0], h[:, 0]),
        (packed, c, h),
    ):
        (output, h_n), (expected, expected_h_n) = fused(*arguments), plain(*arguments)
        torch.testing.assert_close(h_n, expected_h_n)
        if arguments[0] is packed:
            assert torch.equal(output.batch_sizes, expected.batch_sizes)
            output, expected = output.data, expected.data
        torch.testing.assert_close(output, expected)


def test_gradients_through_a_packed_sequence():
    unit = FusedMCU(3, 4, 5)
    x, c = torch.randn(6, 4, 3, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    lengths = torch.tensor([2, 6, 2, 5])
    output, h_n = unit(x, c, None, lengths)
    expected = torch.autograd.grad(output.sum() + h_n.square().sum(), [x, c, *unit.parameters()])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h_n = unit(packed, c)
    grads = torch.autograd.grad(output.data.sum() + h_n.square().sum(), [x, c, *unit.parameters()])
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, value)


def test_cell_steps_are_the_sequence():
    unit, cell = FusedMCU(3, 4, 5), FusedMCUCell(3, 4, 5)
    cell.load_state_dict(unit.state_dict())
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    output, h_n = unit(x, c)
    hx = None
    for t in range(6):
        hx = cell(x[t], c, hx)
        assert torch.equal(hx, output[t])
    assert torch.equal(hx, h_n[0])
    alone = cell(x[0, 1], c[1])
    assert alone.shape == (5,)
    assert torch.equal(alone, output[0, 1])


def test_cell_gradients():
    cell, plain = FusedMCUCell(3, 4, 5).double(), MCU(3, 4, 5).double()
    plain.load_state_dict(cell.state_dict())
    x, c, h = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4, 5))
    grads = torch.autograd.grad(cell(x, c, h).square().sum(), [x, c, h, *cell.parameters()])
    output, _ = plain(x[None], c, h[None])
    expected = torch.autograd.grad(output.square().sum(), [x, c, h, *plain.parameters()])
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    unit = FusedMCU(3, 4, 5, mix="concat", batch_first=True, engine="cpu")
    twin = copied(unit)
    x, c = torch.randn(2, 6, 3), torch.randn(2, 4)
    assert torch.equal(twin(x, c)[0], unit(x, c)[0])
    assert (
        repr(twin)
        == repr(unit)
        == ("FusedMCU(3, 4, 5, mix='concat', batch_first=True, engine='cpu')")
    )


def test_functional_call():
    unit = FusedMCU(3, 4, 5)
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    doubled = {name: (2 * p).detach().requires_grad_() for name, p in unit.named_parameters()}
    output, _ = torch.func.functional_call(unit, doubled, (x, c))
    output.sum().backward()
    assert all(p.grad is not None for p in doubled.values())
    assert all(p.grad is None for p in unit.parameters())
    twin = FusedMCU(3, 4, 5)
    twin.load_state_dict(doubled)
    assert torch.equal(twin(x, c)[0], output)


def test_moves_like_a_module():
    unit = FusedMCU(3, 4, 5, device="meta", dtype=torch.float64)
    assert unit.weight_f.is_meta
    assert unit.weight_f.dtype == torch.float64
    output, h_n = unit(
        *(torch.randn(s, device="meta", dtype=torch.float64) for s in ((6, 2, 3), (2, 4)))
    )
    assert output.shape == (6, 2, 5)
    assert h_n.shape == (1, 2, 5)
