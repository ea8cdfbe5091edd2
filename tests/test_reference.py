"""The equations and their hand-derived backward."""

import math

import pytest
import torch
from helpers import ODD_SIZES, Size, problem, reference_results, relative_errors
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmixer_kernels import reference
from mmixer_kernels.reference import MCU, Weights

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def test_fresh_memory_is_nan():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()


def test_one_unit_by_hand():
    """H = 1 without LayerNorm, so that every equation is a line of arithmetic."""
    w_f, w_g, w_s, w_r, w_z, w_h = 0.3, -0.7, (0.9, 0.4), -0.2, 0.6, 1.1
    f, g, h = 0.5, -1.5, 0.25

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    f_bar, g_bar = math.tanh(w_f * f), math.tanh(w_g * g)
    s = sigmoid(w_s[0] * f_bar + w_s[1] * g_bar)
    x = s * f_bar + (1 - s) * g_bar
    r, z = sigmoid(w_r * (x + h)), sigmoid(w_z * (x + h))
    expected = z * math.tanh(w_h * (r * h + x)) + (1 - z) * h

    def tensor(*values):
        return torch.tensor([values], dtype=torch.float64)

    weights = Weights(tensor(w_f), tensor(w_g), tensor(*w_s), *(tensor(w) for w in (w_r, w_z, w_h)))
    output, h_n = reference.mcu(tensor(f)[None], tensor(g), weights, tensor(h))
    assert output.item() == pytest.approx(expected, rel=1e-14)
    assert h_n.item() == output.item()


def test_layer_norm_and_concat_by_formula():
    p = problem(Size(1, 3, 4, 5, 6))
    w = p.weights

    def norm(a, row):
        centred = a - a.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * w.norm_weight[row] + w.norm_bias[row]

    f_bar = torch.tanh(norm(p.input[0] @ w.weight_f.T, 0))
    g_bar = torch.tanh(norm(p.context @ w.weight_g.T, 1))
    x = norm(torch.cat([f_bar, g_bar], -1) @ w.weight_s.T, 2)
    r = torch.sigmoid(norm((x + p.hx) @ w.weight_r.T, 3))
    z = torch.sigmoid(norm((x + p.hx) @ w.weight_z.T, 4))
    n = torch.tanh(norm((r * p.hx + x) @ w.weight_h.T, 5))
    output, _ = reference.mcu(p.input, p.context, w, p.hx, mix="concat")
    torch.testing.assert_close(output[0], z * n + (1 - z) * p.hx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix", ["gated", "concat"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("lengths", [False, True])
def test_backward_against_autograd(mix, layer_norm, lengths):
    for size in ODD_SIZES:
        p = problem(size, layer_norm=layer_norm, lengths=lengths)
        truth = reference_results(p, mix)
        grads = reference.mcu_backward(
            p.grad_output, p.grad_h_n, p.input, p.context, p.weights, p.hx, p.lengths, mix=mix
        )
        named = {"grad input": grads[0], "grad context": grads[1], "grad hx": grads[3]}
        named.update((f"grad {k}", v) for k, v in grads[2]._asdict().items() if v is not None)
        for name, error in relative_errors(named, truth).items():
            assert error < 1e-11, (size, name)


def test_gradcheck():
    p = problem(Size(3, 2, 3, 2, 4), lengths=True)
    operands = [x.requires_grad_() for x in p.operands().values()]

    def run(input, context, hx, *weights):
        return reference.mcu(input, context, Weights(*weights), hx, p.lengths)

    assert torch.autograd.gradcheck(run, operands)


def test_padding_is_never_read():
    """NaN past a sample's length reaches neither outputs nor gradients."""
    p = problem(Size(4, 3, 3, 2, 4), lengths=True)
    p = p._replace(lengths=torch.tensor([4, 1, 2]))
    clean = reference_results(p)
    padding = torch.arange(4)[:, None] >= p.lengths
    dirty = reference_results(p._replace(input=p.input.masked_fill(padding[..., None], torch.nan)))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    assert (clean["output"][padding] == 0).all()
    assert torch.equal(clean["h_n"][1], clean["output"][0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    p = problem(Size(20, 3, 6, 5, 32), dtype=dtype)
    output, h_n = reference.mcu(p.input, p.context, p.weights, p.hx)
    exact, _ = reference.mcu(
        *(x.float() for x in (p.input, p.context)), p.to(torch.float32).weights, p.hx.float()
    )
    assert output.dtype == h_n.dtype == dtype
    assert torch.equal(output, exact.to(dtype))


class TestModule:
    def test_parameters(self):
        unit = MCU(3, 5, 16)
        shapes = {name: tuple(x.shape) for name, x in unit.named_parameters()}
        assert shapes == {
            "weight_f": (16, 3),
            "weight_g": (16, 5),
            "weight_s": (16, 32),
            "weight_r": (16, 16),
            "weight_z": (16, 16),
            "weight_h": (16, 16),
            "norm_weight": (6, 16),
            "norm_bias": (6, 16),
        }
        assert (unit.norm_weight == 1).all()
        assert (unit.norm_bias == 0).all()
        for name, parameter in unit.named_parameters():
            if not name.startswith("norm"):
                assert 0.15 < parameter.abs().max() <= 0.25, name  # bound 1 / sqrt(16)
        assert "norm_weight" not in MCU(3, 5, 16, layer_norm=False).state_dict()

    def test_layouts_agree(self):
        unit = MCU(3, 4, 5)
        first = MCU(3, 4, 5, batch_first=True)
        first.load_state_dict(unit.state_dict())
        x, c, h = torch.randn(6, 2, 3), torch.randn(2, 4), torch.randn(1, 2, 5)
        output, h_n = unit(x, c, h)
        swapped, h_n_first = first(x.transpose(0, 1), c, h)
        assert torch.equal(swapped.transpose(0, 1), output)
        assert torch.equal(h_n_first, h_n)
        alone, h_alone = unit(x[:, 1], c[1], h[:, 1])
        torch.testing.assert_close(alone, output[:, 1])
        torch.testing.assert_close(h_alone, h_n[:, 1])
        assert alone.shape == (6, 5)
        assert h_alone.shape == (1, 5)

    def test_packed_sequence_is_lengths(self):
        unit = MCU(3, 4, 5)
        x, c, h = torch.randn(6, 4, 3), torch.randn(4, 4), torch.randn(1, 4, 5)
        lengths = torch.tensor([2, 6, 2, 5])
        output, h_n = unit(x, c, h, lengths)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed_output, packed_h_n = unit(packed, c, h)
        assert torch.equal(packed_output.sorted_indices, packed.sorted_indices)
        padded, _ = pad_packed_sequence(packed_output)
        torch.testing.assert_close(padded, output)
        torch.testing.assert_close(packed_h_n, h_n)

    def test_repr_names_what_is_not_default(self):
        assert repr(MCU(3, 4, 5)) == "MCU(3, 4, 5)"
        assert repr(MCU(3, 4, 5, mix="concat")) == "MCU(3, 4, 5, mix='concat')"
