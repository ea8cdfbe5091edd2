"""`FusedMCU` and `FusedMCUCell` as modules."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from mmixer_kernels import (
    FusedMCU,
    FusedMCUCell,
    FusedMCUStack,
)
from mmixer_kernels.reference import MCU

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


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
    unit, cell = FusedMCU(3, 4, 45), FusedMCUCell(3, 4, 45)
    cell.load_state_dict(unit.state_dict())
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    output, h_n = unit(x, c)
    for grad_mode in (torch.enable_grad(), torch.no_grad()):  # by the op, and past the dispatcher
        with grad_mode:
            hx = None
            for t in range(6):
                hx = cell(x[t], c, hx)
                torch.testing.assert_close(hx, output[t], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hx, h_n[0], rtol=1e-5, atol=1e-6)
            alone = cell(x[0, 1], c[1])
            assert alone.shape == (45,)
            torch.testing.assert_close(alone, output[0, 1], rtol=1e-5, atol=1e-6)


def test_cell_with_bfloat16_weights():
    """`cell.bfloat16()` beside float32 features: float32 states, the same without a gradient."""
    cell = FusedMCUCell(3, 4, 45).bfloat16()
    x, c, h = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 45)
    with_graph = cell(x, c, h)
    with torch.no_grad():
        plain = cell(x, c, h)
    widened = FusedMCUCell(3, 4, 45)
    widened.load_state_dict({name: p.float() for name, p in cell.state_dict().items()})
    assert plain.dtype == torch.float32
    assert torch.equal(plain, with_graph)
    torch.testing.assert_close(plain, widened(x, c, h), rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(with_graph.sum(), list(cell.parameters()))
    assert all(grad.dtype == torch.bfloat16 for grad in grads)


def test_a_parametrized_weight():
    unit = FusedMCU(3, 4, 5)
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    expected, _ = unit(x, c)
    torch.nn.utils.parametrizations.weight_norm(unit, "weight_r")
    output, _ = unit(x, c)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert unit.parametrizations.weight_r.original0.grad is not None


def test_parametrized_weights_of_a_stack():
    unit, x = FusedMCUStack(3, 0, 5, 2, bidirectional=True), torch.randn(6, 2, 3)
    expected, _ = unit(x)
    for name in ("weight_f_l0", "weight_h_l1_reverse"):
        torch.nn.utils.parametrizations.weight_norm(unit, name)
    output, _ = unit(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in unit.parameters())
    parametrize.remove_parametrizations(unit, "weight_f_l0")  # It is the last parameter then.
    torch.testing.assert_close(unit(x)[0], expected)


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
    unit = FusedMCU(3, 4, 5, mix="concat", batch_first=True, engine="cpu", recompute=True)
    twin = copied(unit)
    x, c = torch.randn(2, 6, 3), torch.randn(2, 4)
    assert torch.equal(twin(x, c)[0], unit(x, c)[0])
    assert (
        repr(twin)
        == repr(unit)
        == "FusedMCU(3, 4, 5, mix='concat', batch_first=True, engine='cpu', recompute=True)"
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


@pytest.mark.parametrize("module", [FusedMCU, FusedMCUCell, MCU])
def test_skip_init(module):
    empty, full = torch.nn.utils.skip_init(module, 3, 4, 5), module(3, 4, 5)
    empty.load_state_dict(full.state_dict())
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    x = x[0] if module is FusedMCUCell else x
    torch.testing.assert_close(empty(x, c), full(x, c), rtol=0, atol=0)


def test_flatten_parameters_does_nothing():
    unit = FusedMCU(3, 4, 5)
    before = {name: p.data_ptr() for name, p in unit.named_parameters()}
    assert unit.flatten_parameters() is None
    assert {name: p.data_ptr() for name, p in unit.named_parameters()} == before


@pytest.mark.parametrize("module", [lambda *sizes: FusedMCU(*sizes, engine="reference"), MCU])
@pytest.mark.parametrize("lengths", [None, torch.ones(0, dtype=torch.int64)])
def test_no_samples(module, lengths):
    """An empty batch gives empty results and gradients of zero, as it does for nn.GRU."""
    unit = module(3, 4, 5)
    x, c, h = (torch.randn(s, requires_grad=True) for s in ((6, 0, 3), (0, 4), (1, 0, 5)))
    output, h_n = unit(x, c, h, lengths)
    assert output.shape == (6, 0, 5)
    assert h_n.shape == (1, 0, 5)
    (output.sum() + h_n.sum()).backward()
    assert all(operand.grad.shape == operand.shape for operand in (x, c, h))
    assert not any(parameter.grad.any() for parameter in unit.parameters())


@pytest.mark.parametrize(
    "module", [FusedMCU, MCU, partial(FusedMCUStack, num_layers=2, bidirectional=True)]
)
@pytest.mark.parametrize("lengths", [[6, 5, 2, 2], [2, 6, 2, 5]])
def test_a_packed_sequence_inside_compile(module, lengths):
    unit = module(3, 4, 5)
    x, c = torch.randn(6, 4, 3, requires_grad=True), torch.randn(4, 4)
    in_order = lengths[0] == 6

    def packs_itself(x):
        output, h_n = unit(pack_padded_sequence(x, lengths, enforce_sorted=in_order), c)
        return output.data, h_n

    def is_given_it(x, call=unit):
        output, h_n = call(pack_padded_sequence(x, lengths, enforce_sorted=in_order), c)
        assert type(output) is PackedSequence
        return output.data, h_n

    compiled = torch.compile(unit, backend="aot_eager")
    results = []
    for function in (
        is_given_it,
        lambda x: is_given_it(x, compiled),
        torch.compile(packs_itself, backend="aot_eager"),
    ):
        output, h_n = function(x)
        loss = output.square().sum() + h_n.sum()
        results.append((output, h_n, *torch.autograd.grad(loss, [x, *unit.parameters()])))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("module", [FusedMCU, MCU, partial(FusedMCUStack, bidirectional=True)])
def test_another_default_device(module, default_device):
    unit = module(3, 4, 5, device="cpu")
    states = 1 + unit.bidirectional
    x, c, h = (torch.randn(s, device="cpu") for s in ((6, 3, 3), (3, 4), (states, 3, 5)))
    lengths = torch.tensor([2, 6, 4], device="cpu")
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for arguments in ((x, c, h, lengths), (packed, c, h), (x[:, 0], c[0])):
        output, h_n = unit(*arguments)
        output = output.data if arguments[0] is packed else output
        assert output.device == h_n.device == x.device
        (output.sum() + h_n.sum()).backward()
