"""Every entrance says what is wrong: the argument, what it is, what it must be."""

import pytest
import torch
from helpers import Size, problem
from torch.nn.utils.rnn import pack_padded_sequence

from mmixer_kernels import FusedMCU, FusedMCUCell
from mmixer_kernels.functional import mcu, mcu_cell, mcu_group
from mmixer_kernels.reference import MCU

P = problem(Size(4, 3, 5, 6, 7), dtype=torch.float32)
X, C, W, H = P.input, P.context, P.weights, P.hx[None]

WRONG_CALLS = [
    ({"input": X[0, 0]}, ValueError, r"input must be \[T, B, input_size\], or .* has shape \[5\]"),
    ({"input": [1.0]}, TypeError, "input must be a Tensor or a PackedSequence, but is a list"),
    ({"input": X[..., :4]}, ValueError, r"input must have 5 features \(input_size\), but has 4"),
    ({"input": X[:0]}, ValueError, r"at least one step .* has 0 steps \(T\)"),
    ({"input": X[:, :0], "context": C[:0]}, ValueError, r"0 samples \(B\)"),
    ({"input": X.long()}, TypeError, "input must be float64, .* but is int64"),
    ({"context": C[0]}, ValueError, r"context must be \[B, context_size\], but has shape \[6\]"),
    ({"context": C[:2]}, ValueError, r"context must have shape \[3, 6\] .* has \[2, 6\]"),
    ({"context": C[:, :5]}, ValueError, r"context must have shape \[3, 6\] .* has \[3, 5\]"),
    (
        {"context": C.double()},
        TypeError,
        "context must have input's dtype, float32, but is float64",
    ),
    (
        {"context": C.to("meta")},
        ValueError,
        "context must be on input's device, cpu, but is on meta",
    ),
    ({"context": 1.0}, TypeError, "context must be a Tensor, but is a float"),
    ({"hx": H[0]}, ValueError, r"hx must be \[1, B, H\], but has shape \[3, 7\]"),
    ({"hx": H[:, :2]}, ValueError, r"hx must have shape \[3, 7\] .* has \[2, 7\]"),
    ({"lengths": torch.tensor([1.0, 2, 3])}, TypeError, "lengths must be int64 or int32"),
    ({"lengths": [1, 2, 3]}, TypeError, "lengths must be a Tensor, but is a list"),
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must be \[B\] = \[3\]"),
    ({"lengths": torch.tensor([1, 0, 3])}, ValueError, r"lengths must be in 1\.\.4 .* from 0 to 3"),
    ({"lengths": torch.tensor([1, 5, 3])}, ValueError, r"lengths must be in 1\.\.4 .* from 1 to 5"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_CALLS)
def test_wrong_arguments_from_every_entrance(changed, error, message):
    arguments = {"input": X, "context": C, "hx": H, "lengths": None, **changed}
    fused, plain = FusedMCU(5, 6, 7), MCU(5, 6, 7)
    for call in (fused, plain, lambda **kw: mcu(weights=W, **kw)):
        with pytest.raises(error, match=message):
            call(**arguments)


WRONG_OPTIONS = [
    ({"mix": "sum"}, ValueError, "mix must be one of gated, concat, but is 'sum'"),
    ({"eps": 0.0}, ValueError, "eps must be a positive finite number, but is 0.0"),
    ({"eps": float("nan")}, ValueError, "eps must be a positive finite number, but is nan"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        mcu(X, C, W, **options)
    for module in (FusedMCU, FusedMCUCell, MCU):
        with pytest.raises(error, match=message):
            module(5, 6, 7, **options)


@pytest.mark.parametrize("module", [FusedMCU, FusedMCUCell, MCU])
def test_wrong_sizes(module):
    for sizes, name in (
        ((0, 6, 7), "input_size"),
        ((5, -1, 7), "context_size"),
        ((5, 6, 2.5), "hidden"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* must be a positive integer, but is"):
            module(*sizes)


def test_wrong_weights():
    with pytest.raises(ValueError, match=r"weight_s must have shape \[7, 14\] .* has \[7, 7\]"):
        mcu(X, C, W._replace(weight_s=W.weight_s[:, :7]))
    with pytest.raises(ValueError, match=r"norm_bias must have shape \[6, 7\]"):
        mcu(X, C, W._replace(norm_bias=W.norm_bias[:5]))
    with pytest.raises(ValueError, match="norm_weight and norm_bias must both be given"):
        mcu(X, C, W._replace(norm_bias=None))
    with pytest.raises(TypeError, match="weight_r must have input's dtype, float32, or bfloat16"):
        mcu(X, C, W._replace(weight_r=W.weight_r.double()))
    wide = W.map(torch.Tensor.double)._replace(weight_r=W.weight_r.bfloat16())
    with pytest.raises(TypeError, match="weight_r must have input's dtype, float64, but is bf"):
        mcu(X.double(), C.double(), wide)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_some_weights_in_bfloat16(engine):
    mixed = W._replace(weight_r=W.weight_r.bfloat16(), norm_bias=W.norm_bias.bfloat16())
    output, _ = mcu(X, C, mixed, engine=engine)
    expected, _ = mcu(X, C, mixed.map(torch.Tensor.float), engine=engine)
    assert torch.equal(output, expected)


def test_unbatched_and_packed_mistakes():
    with pytest.raises(ValueError, match=r"context must be \[context_size\] for unbatched input"):
        mcu(X[:, 0], C, W)
    with pytest.raises(ValueError, match=r"hx must be \[1, H\] for unbatched input"):
        mcu(X[:, 0], C[0], W, H)
    with pytest.raises(ValueError, match="lengths must be None when input is unbatched"):
        mcu(X[:, 0], C[0], W, lengths=torch.tensor([2]))
    packed = pack_padded_sequence(X, torch.tensor([1, 4, 2]), enforce_sorted=False)
    with pytest.raises(ValueError, match="lengths must be None when input is a PackedSequence"):
        mcu(packed, C, W, lengths=torch.tensor([1, 4, 2]))
    with pytest.raises(ValueError, match="context must have one row a sequence"):
        mcu(packed, C[:2], W)


def test_cell_mistakes():
    cell = FusedMCUCell(5, 6, 7)
    with pytest.raises(ValueError, match=r"input must be \[B, input_size\], or"):
        cell(X, C)
    with pytest.raises(ValueError, match=r"hx must have shape \[3, 7\]"):
        cell(X[0], C, P.hx[:1])
    with pytest.raises(ValueError, match="hx must have as many dimensions as input, 2"):
        cell(X[0], C, P.hx[0])
    with pytest.raises(ValueError, match="context must have as many dimensions as input, 1"):
        cell(X[0, 0], C)
    with pytest.raises(ValueError, match=r"context must have shape \[3, 6\]"):
        mcu_cell(X[0], C[:1], W)


def test_group_mistakes():
    with pytest.raises(ValueError, match="one entry a group, but have 2, 1 and 2"):
        mcu_group([X, X], [C], [W, W])
    with pytest.raises(ValueError, match="one entry a group, but have 0, 0 and 0"):
        mcu_group([], [], [])
    with pytest.raises(ValueError, match=r"inputs must agree in T and B.*inputs\[1\] \[3, 3, 5\]"):
        mcu_group([X, X[:3]], [C, C], [W, W])
    with pytest.raises(ValueError, match=r"hx must be \[G, B, H\] with G = 2"):
        mcu_group([X, X], [C, C], [W, W], H)
    other = problem(Size(4, 3, 5, 6, 8), dtype=torch.float32).weights
    with pytest.raises(ValueError, match="weights must agree in H"):
        mcu_group([X, X], [C, C], [W, other])
    with pytest.raises(ValueError, match="weights must all have norm_weight"):
        mcu_group([X, X], [C, C], [W, W._replace(norm_weight=None, norm_bias=None)])
