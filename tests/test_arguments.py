"""Every entrance says what is wrong: the argument, what it is, what it must be."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Size, problem
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from mmixer_kernels import (
    CellStream,
    FusedMCU,
    FusedMCUCell,
    FusedMCUStack,
    MMixer,
    PrepackedMCU,
    StreamClassifiers,
)
from mmixer_kernels.functional import mask_to_lengths, mcu, mcu_cell, mcu_group
from mmixer_kernels.reference import MCU

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

P = problem(Size(4, 3, 5, 6, 7), dtype=torch.float32)
X, C, W, H = P.input, P.context, P.weights, P.hx[None]
BARE = problem(Size(4, 3, 5, 0, 7), dtype=torch.float32).weights  # without context

WRONG_CALLS = [
    ({"input": X[0, 0]}, ValueError, r"input must be \[T, B, input_size\], or .* has shape \[5\]"),
    ({"input": [1.0]}, TypeError, "input must be a Tensor or a PackedSequence, but is a list"),
    ({"input": X[..., :4]}, ValueError, r"input must have 5 features \(input_size\), but has 4"),
    ({"input": X[:0]}, ValueError, "input must have at least one step, but has none"),
    ({"input": None}, TypeError, "input must be a Tensor or a PackedSequence, but is a NoneType"),
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
    ({"context": None}, TypeError, "context must be a Tensor, but is a NoneType"),
    ({"hx": 1.0}, TypeError, "hx must be a Tensor, but is a float"),
    ({"hx": H.double()}, TypeError, "hx must have input's dtype, float32, but is float64"),
    ({"hx": H.to("meta")}, ValueError, "hx must be on input's device, cpu, but is on meta"),
    ({"hx": H[0]}, ValueError, r"hx must be \[1, B, H\], but has shape \[3, 7\]"),
    ({"hx": H[:, :2]}, ValueError, r"hx must have shape \[3, 7\] .* has \[2, 7\]"),
    ({"lengths": torch.tensor([1.0, 2, 3])}, TypeError, "lengths must be int64 or int32"),
    ({"lengths": [1, 2, 3]}, TypeError, "lengths must be a Tensor, but is a list"),
    ({"lengths": 3}, TypeError, "lengths must be a Tensor, but is a int"),
    (
        {"lengths": torch.tensor([1, 2, 3], device="meta")},
        ValueError,
        "lengths must be on input's device, cpu, but is on meta",
    ),
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
    ({"eps": 0.0}, ValueError, "eps must be a positive finite float, but is 0.0"),
    ({"eps": float("nan")}, ValueError, "eps must be a positive finite float, but is nan"),
    ({"eps": True}, ValueError, "eps must be a positive finite float, but is True"),
    ({"eps": 10**400}, ValueError, "eps must be a positive finite float, but is 1000"),
    ({"mix": torch.ones(2)}, ValueError, "mix must be one of gated, concat, but is tensor"),
    ({"eps": "1e-5"}, ValueError, "eps must be a positive finite float, but is '1e-5'"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS)
def test_wrong_options(options, error, message):
    for call in (
        lambda: mcu(X, C, W, **options),
        lambda: mcu_cell(X[0], C, W, **options),
        lambda: mcu_group([X], [C], [W], **options),
    ):
        with pytest.raises(error, match=message):
            call()
    for module in (FusedMCU, FusedMCUCell, FusedMCUStack, MCU):
        with pytest.raises(error, match=message):
            module(5, 6, 7, **options)


@pytest.mark.parametrize("module", [FusedMCU, FusedMCUCell, FusedMCUStack, MCU])
def test_wrong_sizes(module):
    for sizes, name in (
        ((0, 6, 7), "input_size"),
        ((5, 6, 2.5), "hidden"),
        ((5, 6, True), "hidden"),
        ((5, -1, 7), "context_size"),
        ((5, False, 7), "context_size"),
        ((5, None, 7), "context_size"),
    ):
        must = "an int from 0 on" if name == "context_size" else "a positive int"
        with pytest.raises(ValueError, match=f"{name}.* must be {must}, but is"):
            module(*sizes)


def test_an_unknown_engine():
    message = "engine must be one of auto, .*, but is 'fast'"
    for call in (
        lambda: mcu(X, C, W, engine="fast"),
        lambda: mcu_cell(X[0], C, W, engine="fast"),
        lambda: mcu_group([X], [C], [W], engine="fast"),
        lambda: FusedMCU(5, 6, 7, engine="fast"),
        lambda: FusedMCUCell(5, 6, 7, engine="fast"),
        lambda: FusedMCUStack(5, 6, 7, engine="fast"),
        lambda: MMixer([5, 5], 3, engine="fast"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


WRONG_WEIGHTS = [
    (
        W._replace(weight_f=torch.tensor(1.0)),
        ValueError,
        r"weight_f must be \[H, input_size\], but has shape \[\]",
    ),
    (
        W._replace(weight_g=W.weight_g[:, :0]),
        ValueError,
        r"weight_g must be \[H, context_size\], but has shape \[7, 0\]",
    ),
    (
        W._replace(weight_f=W.weight_f.T),
        ValueError,
        r"weight_f must have shape \[7, 7\] .* has \[5, 7\]",
    ),
    (None, TypeError, "weights.* must be mmixer_kernels.functional.Weights.*, but is a NoneType"),
    (tuple(W), TypeError, "weights.* must be mmixer_kernels.functional.Weights.*, but is a tuple"),
    (W._replace(weight_z=1.0), TypeError, "weight_z must be a Tensor, but is a float"),
    (W._replace(weight_f=None), TypeError, "weight_f must be a Tensor, but is a NoneType"),
    (W._replace(weight_s=W.weight_s.numpy()), TypeError, "weight_s must be a Tensor, but is a nda"),
    (W._replace(norm_bias=[1.0]), TypeError, "norm_bias must be a Tensor, but is a list"),
    (W._replace(weight_r=W.weight_r[0]), ValueError, r"weight_r must be \[H, H\], but has shape"),
    (
        W._replace(weight_s=W.weight_s[:, :7]),
        ValueError,
        r"weight_s must have shape \[7, 14\] .* has \[7, 7\]",
    ),
    (
        W._replace(norm_bias=W.norm_bias[:5]),
        ValueError,
        r"norm_bias must have shape \[6, 7\] .* has \[5, 7\]",
    ),
    (W._replace(norm_bias=None), ValueError, "norm_weight and .*norm_bias must both be given"),
    (W._replace(weight_g=None), ValueError, "weight_g and .*weight_s must both be given"),
    (BARE, ValueError, r"context.* must be None beside weights without weight_g .* shape \[3, 6\]"),
    (
        W._replace(weight_g=None, weight_s=None),
        ValueError,
        "context.* must be None beside weights without weight_g",
    ),
    (
        W._replace(weight_r=W.weight_r.double()),
        TypeError,
        "weight_r must have input's dtype, float32, or bfloat16",
    ),
    (
        W._replace(weight_h=W.weight_h.to("meta")),
        ValueError,
        "weight_h must be on input's device, cpu, but is on meta",
    ),
]


@pytest.mark.parametrize(
    ("weights", "error", "message", "autocast"),
    [
        (*call, autocast)
        for call in WRONG_WEIGHTS
        for autocast in (False, True)
        if not (autocast and "dtype" in call[2])  # which autocast gives them
    ],
)
def test_wrong_weights_from_every_function(weights, error, message, autocast):
    for call in (
        lambda: mcu(X, C, weights),
        lambda: mcu_cell(X[0], C, weights),
        lambda: mcu_group([X], [C], [weights]),
    ):
        with torch.autocast("cpu", enabled=autocast), pytest.raises(error, match=message):
            call()


def test_bfloat16_weights_go_with_float32_alone():
    wide = W.map(torch.Tensor.double)._replace(weight_r=W.weight_r.bfloat16())
    with pytest.raises(TypeError, match="weight_r must have input's dtype, float64, but is bf"):
        mcu(X.double(), C.double(), wide)


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
    with pytest.raises(ValueError, match="context must have one row per sequence"):
        mcu(packed, C[:2], W)
    with pytest.raises(TypeError, match="hx must be a Tensor, but is a list"):
        mcu(packed, C, W, [0.0])
    with pytest.raises(TypeError, match="context must be a Tensor, but is a NoneType"):
        mcu(packed, None, W)
    narrow = pack_padded_sequence(X[..., :4], torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match=r"input must have 5 features \(input_size\), but has 4"):
        mcu(narrow, C, W)
    with pytest.raises(TypeError, match=r"input must be float64, .* but is int64"):
        mcu(pack_padded_sequence(X.long(), torch.tensor([4, 3, 2])), C, W)


def test_mistakes_without_context():
    for unit in (FusedMCU(5, 0, 7), MCU(5, 0, 7), FusedMCUStack(5, 0, 7)):
        with pytest.raises(ValueError, match="context must be None, since this unit has none"):
            unit(X, C, H)
        with pytest.raises(ValueError, match=r"hx must be \[1, B, H\], but has shape \[3, 6\]"):
            unit(X, C)
    with pytest.raises(TypeError, match=r"contexts\[0\] must be a Tensor, but is a NoneType"):
        mcu_group([X], None, [W])
    with pytest.raises(ValueError, match=r"contexts\[0\] must be None beside weights without"):
        mcu_group([X], [C], [BARE])
    with pytest.raises(ValueError, match=r"inputs and weights must have one entry .* 2 and 1"):
        mcu_group([X, X], None, [BARE])
    with pytest.raises(ValueError, match="weights must all have weight_g and weight_s, or none"):
        mcu_group([X, X], None, [BARE, W])


@pytest.mark.parametrize("kind", [FusedMCU, FusedMCUStack])
def test_a_tracer_is_told_that_there_is_no_context(kind):
    unit = kind(5, 0, 7)
    with pytest.raises(ValueError, match=r"tracer by concrete_args=\{'context': None\}"):
        torch.fx.symbolic_trace(unit)
    traced = torch.fx.symbolic_trace(unit, concrete_args={"context": None})
    assert torch.equal(traced(X, None, H)[0], unit(X, H)[0])


def test_mistakes_in_both_directions():
    for weights, error, message in (
        ((W, W, W), TypeError, "weights must be .*Weights, or a pair of them, but is a tuple of 3"),
        ((W,), TypeError, "weights must be .*Weights, or a pair of them, but is a tuple of 1"),
        ((W, None), TypeError, r"weights\[1\] must be .*Weights, but is a NoneType"),
        ((W, BARE), ValueError, "weights must all have weight_g and weight_s, or none"),
        (
            (W, W._replace(weight_z=W.weight_z[:, :2])),
            ValueError,
            r"weights\[1\].weight_z must have shape \[7, 7\]",
        ),
    ):
        with pytest.raises(error, match=message):
            mcu(X, C, weights)
    with pytest.raises(TypeError, match=r"weights must be .*Weights, but is a tuple of 2"):
        mcu_cell(X[0], C, (W, W))
    with pytest.raises(ValueError, match=r"hx must be \[2, B, H\], but has shape \[1, 3, 7\]"):
        mcu(X, C, (W, W), H)
    with pytest.raises(ValueError, match=r"input must have 5 features \(input_size\), but has 4"):
        mcu(X[..., :4], C, (W, W))


@pytest.mark.parametrize("name", ["input", "context", "weights[1].weight_r"])
def test_freed_memory_in_both_directions(name):
    other = W._replace(weight_r=W.weight_r.clone())
    operands = {"input": X.clone(), "context": C.clone(), "weights[1].weight_r": other.weight_r}
    operands[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must have its values in memory"):
        mcu(operands["input"], operands["context"], (W, other))


def test_stack_mistakes():
    for options, error, message in (
        ({"num_layers": 0}, ValueError, "num_layers must be a positive int, but is 0"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be True or False, but is 1"),
        ({"dropout": 1.5}, ValueError, r"dropout must be a number in 0\.\.1, but is 1.5"),
        ({"dropout": True}, ValueError, r"dropout must be a number in 0\.\.1, but is True"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be a number in 0\.\.1"),
        ({"init": "zeros"}, ValueError, "init must be one of uniform, orthogonal, but is 'zeros'"),
    ):
        with pytest.raises(error, match=message):
            FusedMCUStack(5, 6, 7, **options)
    with pytest.warns(UserWarning, match="dropout=0.5 has no effect with num_layers=1"):
        FusedMCUStack(5, 6, 7, dropout=0.5)
    stack = FusedMCUStack(5, 6, 7, num_layers=2, bidirectional=True)
    for hx, message in (
        (H, r"hx must be \[4, B, H\], but has shape \[1, 3, 7\]"),
        (torch.zeros(4, 2, 7), r"hx must have shape \[3, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            stack(X, C, hx)
    with pytest.raises(ValueError, match=r"hx must be \[4, H\] for unbatched input"):
        stack(X[:, 0], C[0], H)
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, but is a Non"):
        stack(None, C)


def test_masks():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    assert mask_to_lengths(mask).tolist() == [2, 1, 3]
    assert mask_to_lengths(mask[:0]).tolist() == []
    for wrong, error, message in (
        ([[1, 0]], TypeError, "mask must be a Tensor, but is a list"),
        (mask.long(), TypeError, r"mask must be bool, but is int64: convert it with .bool\(\)"),
        (mask[0], ValueError, r"mask must be \[B, T\], but has shape \[3\]"),
        (mask[:, 1:], ValueError, r"one at least, .* that of sample 1 is True at the steps \[\]"),
        (mask.flip(1), ValueError, r"that of sample 0 is True at the steps \[1, 2\]"),
        (mask[:, [0, 2, 1]], ValueError, r"that of sample 0 is True at the steps \[0, 2\]"),
    ):
        with pytest.raises(error, match=message):
            mask_to_lengths(wrong)


def test_cell_mistakes():
    cell = FusedMCUCell(5, 6, 7)
    for call in (cell, lambda *operands: mcu_cell(*operands[:2], W, *operands[2:])):
        for operands, message in (
            (([1.0], C), "input must be a Tensor, but is a list"),
            ((X[0], None), "context must be a Tensor, but is a NoneType"),
            ((X[0], C, 0), "hx must be a Tensor, but is a int"),
            ((X[0].long(), C), "input must be float64, .* but is int64"),
            ((X[0], C.double()), "context must have input's dtype, float32, but is float64"),
        ):
            with pytest.raises(TypeError, match=message):
                call(*operands)
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
    for groups, message in (
        ((3, [C], [W]), "inputs must be a sequence, but is a int"),
        (([X], C.shape[0], [W]), "contexts must be a sequence, but is a int"),
        (([X], [C], None), "weights must be a sequence, but is a NoneType"),
        (([X, 1.0], [C, C], [W, W]), r"inputs\[1\] must be a Tensor, but is a float"),
        (([X, X], [C, None], [W, W]), r"contexts\[1\] must be a Tensor, but is a NoneType"),
        (([X, X], [C, C], [W, 1]), r"weights\[1\] must be .*Weights, but is a int"),
        (([X, X], [C, C], [W, W], [H, H]), "hx must be a Tensor, but is a list"),
        (([X, X], [C, C], [W, W], None, [1, 2, 3]), "lengths must be a Tensor, but is a list"),
    ):
        with pytest.raises(TypeError, match=message):
            mcu_group(*groups)
    packed = pack_padded_sequence(X, torch.tensor([4, 3, 2]))
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a Tensor, but is a PackedSequence"):
        mcu_group([packed], [C], [W])
    with pytest.raises(ValueError, match=r"inputs\[0\] must have three dimensions, .* \[3, 5\]"):
        mcu_group([X[0]], [C], [W])
    with pytest.raises(ValueError, match="one entry per group, but have 2, 1 and 2"):
        mcu_group([X, X], [C], [W, W])
    with pytest.raises(ValueError, match="one entry per group, but have 0, 0 and 0"):
        mcu_group([], [], [])
    with pytest.raises(ValueError, match=r"inputs must agree in T and B.*inputs\[1\] T = 3"):
        mcu_group([X, X[:3]], [C, C], [W, W])
    with pytest.raises(ValueError, match=r"hx must be \[G, B, H\] with G = 2"):
        mcu_group([X, X], [C, C], [W, W], H)
    other = problem(Size(4, 3, 5, 6, 8), dtype=torch.float32).weights
    with pytest.raises(ValueError, match="weights must agree in H"):
        mcu_group([X, X], [C, C], [W, other])
    with pytest.raises(ValueError, match="weights must all have norm_weight"):
        mcu_group([X, X], [C, C], [W, W._replace(norm_weight=None, norm_bias=None)])


def test_stream_mistakes():
    cell = FusedMCUCell(5, 6, 7)
    with pytest.raises(TypeError, match="or a FusedMCUStack, but is a FusedMCU"):
        CellStream(FusedMCU(5, 6, 7), C)
    with pytest.raises(TypeError, match="context must be a Tensor, but is a list"):
        CellStream(cell, [1.0])
    with pytest.raises(ValueError, match=r"context must be \[B, context_size\], but has shape"):
        CellStream(cell, C[0])
    with pytest.raises(TypeError, match="hx must be a Tensor, but is a float"):
        CellStream(cell, C, 0.0)
    stream = CellStream(cell, C)
    with pytest.raises(TypeError, match="input must be a Tensor, but is a NoneType"):
        stream(None)
    with pytest.raises(ValueError, match=r"input must be \[3, 5\] torch.float32, but is \[3, 4\]"):
        stream(X[0, :, :4])
    with pytest.raises(ValueError, match=r"hx must be \[3, 7\] torch.float32, but is \[3, 6\]"):
        stream.reset(context=2 * C, hx=C)
    assert torch.equal(stream(X[0]), CellStream(cell, C)(X[0]))  # nothing was taken over
    with pytest.raises(ValueError, match=r"context must have 6 features \(context_size\), but has"):
        CellStream(cell, C[:, :5])
    with pytest.raises(TypeError, match="context must have the weights' dtype, float32, but is f"):
        CellStream(cell, C.double())
    with pytest.raises(ValueError, match="context must be on the weights' device, cpu, but is on"):
        CellStream(cell, C.to("meta"))


@pytest.mark.parametrize(
    ("unit", "summarizer"), [("mcu", "avg"), ("mcu", "gru"), ("gru", "avg"), ("lstm", "avg")]
)
def test_network_mistakes(unit, summarizer):
    network = MMixer([5, 5], 3, hidden_size=4, unit=unit, summarizer=summarizer)
    for features, error, message in (
        ([X], ValueError, "features must have 2 tensors, one per modality, but has 1"),
        ([X, None], TypeError, r"features\[1\] must be a Tensor, but is a NoneType"),
        ([X, X[..., :4]], ValueError, r"features\[1\] must be \[B, T, 5\], but has shape"),
        ([X, X[:2]], ValueError, "features must agree in B and T"),
        ([X, X.double()], TypeError, r"agree in dtype, .* features\[1\] torch.float64"),
        ([X.double()] * 2, TypeError, r"features\[0\] must have the weights' dtype, float32, but"),
        ([X.long()] * 2, TypeError, r"features\[0\] must be float64, .* but is int64"),
        (
            [X, X.to("meta")],
            ValueError,
            r"features must be on one device, .* features\[1\] on meta",
        ),
        (torch.tensor(1.0), TypeError, "features must be a sequence of Tensors, but is a Tensor"),
        ([X.to("meta")] * 2, ValueError, r"features\[0\] must be on the weights' device, cpu"),
        ([X, X.to_sparse()], TypeError, r"features\[1\] must be a dense Tensor, but is sparse_coo"),
        (None, TypeError, "features must be a sequence of Tensors, but is a NoneType"),
    ):
        with pytest.raises(error, match=message):
            network(features)
    with pytest.raises(TypeError, match="lengths must be a Tensor, but is a list"):
        network([X, X], [1, 2, 3, 3])
    with pytest.raises(ValueError, match=r"lengths must be \[B\] = \[4\], but has shape \[2\]"):
        network([X, X], torch.tensor([1, 2]))


def test_features_inside_autocast():
    network = MMixer([5, 5], 3, hidden_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (X, X.bfloat16()):
            assert network([given, given]).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="features must agree in dtype"):
            network([X.bfloat16(), X])
        message = r"features\[0\] must be torch.float32 or torch.bfloat16 inside autocast, but is"
        for wrong in (X.half(), X.double()):
            with pytest.raises(TypeError, match=message):
                network([wrong, wrong])


def test_a_stream_inside_autocast():
    cell = FusedMCUCell(5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert CellStream(cell, C.bfloat16())(X[0].bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"context must be torch.float32 or torch.bfloat16 in"):
            CellStream(cell, C.double())


def test_network_options():
    for options, error, message in (
        (
            {"feature_sizes": 5},
            TypeError,
            "feature_sizes must be a sequence of sizes, but is a",
        ),
        ({"feature_sizes": [5, True]}, ValueError, r"feature_sizes\[1\] must be a positive int"),
        ({"num_classes": True}, ValueError, "num_classes must be a positive int, but is True"),
        ({"unit": torch.ones(2)}, ValueError, "unit must be one of mcu, gru, lstm, but is tensor"),
        ({"unit": "gru", "mix": "x"}, ValueError, "mix must be one of gated, concat, but is 'x'"),
        ({"unit": "gru", "engine": "fast"}, ValueError, "engine must be one of auto"),
        ({"unit": "lstm", "summarizer": "sum"}, ValueError, "summarizer must be one of avg, max"),
    ):
        with pytest.raises(error, match=message):
            MMixer(**{"feature_sizes": [5, 5], "num_classes": 3, **options})


def test_stream_classifiers_mistakes():
    heads = StreamClassifiers(MMixer([5, 5], 3, hidden_size=4))
    stream = torch.randn(2, 4)
    for streams, error, message in (
        (None, TypeError, "streams must be a sequence of Tensors, but is a NoneType"),
        ([stream], ValueError, "streams must have 2 tensors, one per modality, but has 1"),
        ([stream, None], TypeError, r"streams\[1\] must be a Tensor, but is a NoneType"),
        ([stream, stream[0]], ValueError, r"streams\[1\] must be \[B, hidden_size\] = \[2, 4\]"),
        ([stream, stream[:, :3]], ValueError, r"streams\[1\] must be \[B, hidden_size\]"),
        ([stream, stream[:1]], ValueError, r"streams\[1\] must be \[B, hidden_size\]"),
        ([stream, stream.double()], TypeError, r"streams\[1\] must have the weights' dtype"),
        ([stream, stream.to("meta")], ValueError, r"streams\[1\] must be on the weights' device"),
    ):
        with pytest.raises(error, match=message):
            heads(streams)
    for ours, theirs in zip(heads(torch.stack([stream] * 2)), heads([stream] * 2), strict=True):
        assert torch.equal(ours, theirs)


def test_groups_that_differ():
    wide, meta = W.map(torch.Tensor.double), W.map(lambda x: x.to("meta"))
    with pytest.raises(TypeError, match=r"inputs must agree in dtype.* inputs\[1\] torch.float64"):
        mcu_group([X, X.double()], [C, C.double()], [W, wide])
    with pytest.raises(ValueError, match=r"inputs must be on one device, .* inputs\[1\] on meta"):
        mcu_group([X, X.to("meta")], [C, C.to("meta")], [W, meta])
    for groups, message in (
        (([X, X], [C, C[:2]], [W, W]), r"contexts\[1\] must have shape \[3, 6\]"),
        (([X, X[..., :4]], [C, C], [W, W]), r"inputs\[1\] must have 5 features"),
        (
            ([X, X], [C, C], [W, W._replace(weight_s=W.weight_s.T)]),
            r"weights\[1\].weight_s must have shape \[7, 14\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mcu_group(*groups)


@pytest.mark.parametrize("name", ["input", "context", "hx"])
def test_sparse_and_jagged_tensors(name):
    operands = {"input": X, "context": C, "hx": H}
    tensor = operands[name]
    for wrong, kind in (
        (tensor.to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor(list(tensor), layout=torch.jagged), "jagged"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a dense Tensor, but is {kind}"):
            mcu(weights=W, **{**operands, name: wrong})


def test_packed_sequences_that_nothing_packed():
    packed = pack_padded_sequence(X, torch.tensor([4, 3, 2]))
    for sizes, message in (
        ([3, 3, 2, 3], "batch_sizes must be positive and never grow"),
        ([], "batch_sizes must be positive and never grow"),
        ([3, 3, 2], "batch_sizes must add up to the rows of its data, 9, but give 8"),
    ):
        with pytest.raises(ValueError, match=message):
            mcu(PackedSequence(packed.data, torch.tensor(sizes, dtype=torch.int64)), C, W)
    deep = pack_padded_sequence(X[..., None], torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match=r"input must pack sequences of \[T, B, input_size\]"):
        mcu(deep, C, W)
    unsorted = pack_padded_sequence(X, torch.tensor([1, 4, 2]), enforce_sorted=False)
    with pytest.raises(ValueError, match=r"hx must have one row per sequence .*, 3, but has 5"):
        mcu(unsorted, C, W, torch.randn(1, 5, 7))


@pytest.mark.parametrize("module", [FusedMCU, FusedMCUCell, MCU])
def test_dtypes_of_modules(module):
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="dtype must be float64, float32, bfloat16 or float16"):
            module(5, 6, 7, dtype=dtype)


ARRAY = np.ones((4, 3, 5), np.float32)
WRONG: dict[str, list[Any]] = {
    "tensor": [
        *(1, 0.5, "x", [1.0], (X, X), {"a": X}, ARRAY, object(), W),
        *(X.long(), X.bool(), X.to(torch.complex64), X.to_sparse(), torch.ones(()), X[None, None]),
        pack_padded_sequence(X[..., None], torch.tensor([4, 3, 2])),
    ],
    "tensors": [None, 3, "x", {"a": X}, ARRAY, [X, None], [X, ARRAY], [X, [1.0]], [X, X.long()]],
    "sets": [None, 3, W, [W, None], [W, tuple(W)], [W, dict(W._asdict())]],
    "set": [None, 3, tuple(W), W._asdict(), [W]],
    "bool": [None, 0, 1, "False", "", 1.0, [], ARRAY, X, np.True_],
    "choice": [None, 1, True, "x", "", ["gated"], ARRAY, X],
    "eps": [None, "1e-5", True, 0, -1e-5, float("inf"), float("nan"), [1e-5], ARRAY, X, 1e-5j],
    "size": [None, "4", 2.5, 0, -1, True, [4], ARRAY, X],
    "size or 0": [None, "4", 2.5, -1, True, False, [4], ARRAY, X],
    "probability": [None, "0.5", -0.1, 2, True, float("nan"), [0.5], ARRAY, X],
    "sizes": [None, 4, {4: 4}, [4], [4, None], [4, 0], "44", ARRAY],
    "dtype": ["float32", float, torch.int64, torch.complex64, torch.bool, ARRAY],
    "module": [None, "x", torch.nn.Linear(1, 1), FusedMCU],
}
"""Values that an argument of a kind must not have."""
KINDS = {
    **{name: "tensor" for name in ("input", "context", "hx", "lengths")},
    **{name: "tensors" for name in ("inputs", "contexts", "features", "streams")},
    **{name: "bool" for name in ("layer_norm", "batch_first", "recompute", "bidirectional")},
    **{name: "choice" for name in ("mix", "engine", "unit", "summarizer", "content", "init")},
    **{name: "size" for name in ("input_size", "hidden_size", "num_classes", "num_layers")},
    **{"context_size": "size or 0", "dropout": "probability"},
    **{"eps": "eps", "feature_sizes": "sizes", "dtype": "dtype", "weights": "set"},
    **{"cell": "module", "network": "module"},
}


def entrances() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each with a call that is right."""
    cell, network = FusedMCUCell(5, 6, 7), MMixer([5, 5], 3, hidden_size=4)
    sequence = {"input": X, "context": C, "hx": H, "lengths": torch.tensor([4, 1, 2])}
    step = {"input": X[0], "context": C, "hx": P.hx}
    group = {"inputs": [X, X], "contexts": [C, C], "weights": [W, W]}
    sizes = {"input_size": 5, "context_size": 6, "hidden_size": 7}
    features = {"features": [X, X], "lengths": torch.tensor([3, 1, 2, 3])}
    return {
        "MCU": (MCU, sizes),
        "MCU()": (MCU(5, 6, 7), sequence),
        "FusedMCU": (FusedMCU, sizes),
        "FusedMCU()": (FusedMCU(5, 6, 7), sequence),
        "PrepackedMCU()": (PrepackedMCU(FusedMCU(5, 6, 7)), sequence),
        "FusedMCUCell": (FusedMCUCell, sizes),
        "FusedMCUCell()": (cell, step),
        "FusedMCU() without context": (FusedMCU(5, 0, 7), {"input": X, "hx": H}),
        "FusedMCUStack": (FusedMCUStack, {**sizes, "num_layers": 2, "dropout": 0.5}),
        "FusedMCUStack()": (
            FusedMCUStack(5, 6, 7, bidirectional=True),
            {**sequence, "hx": torch.cat([H, H])},
        ),
        "mcu": (mcu, {**sequence, "weights": W}),
        "mcu_cell": (mcu_cell, {**step, "weights": W}),
        "mcu_group": (mcu_group, {**group, "hx": torch.cat([H, H])}),
        "CellStream": (CellStream, {"cell": cell, "context": C, "hx": P.hx}),
        "CellStream()": (CellStream(cell, C), {"input": X[0]}),
        "CellStream.reset": (CellStream(cell, C).reset, {"context": C, "hx": P.hx}),
        "MMixer": (MMixer, {"feature_sizes": [5, 5], "num_classes": 3}),
        "MMixer gru": (functools.partial(MMixer, [5, 5], 3, unit="gru"), {}),
        "MMixer()": (network, features),
        "MMixer.streams": (network.streams, features),
        "StreamClassifiers": (StreamClassifiers, {"network": network}),
        "StreamClassifiers()": (StreamClassifiers(network), {"streams": [X[0, :, :4]] * 2}),
    }


@pytest.mark.parametrize("entrance", entrances())
def test_every_argument_of_a_wrong_kind_is_named(entrance: str) -> None:
    call, right = entrances()[entrance]
    call(**right)
    names = [*right, *(name for name in inspect.signature(call).parameters if name in KINDS)]
    for name in dict.fromkeys(names):
        if (entrance, name) == ("FusedMCU() without context", "context"):
            continue  # which stands for hx there
        kind = "sets" if (entrance, name) == ("mcu_group", "weights") else KINDS[name]
        optional = name in ("hx", "lengths") or entrance == "CellStream.reset"
        wrong = WRONG[kind] if kind != "tensor" or optional else [None, *WRONG[kind]]
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                call(**{**right, name: value})


def test_hx_and_context_of_another_batch_beside_a_packed_sequence() -> None:
    for lengths, message in (([4, 3, 2], "must have shape"), ([2, 4, 3], "must have one row per")):
        packed = pack_padded_sequence(X, torch.tensor(lengths), enforce_sorted=lengths[1] < 4)
        for more in (2, 4):
            with pytest.raises(ValueError, match=f"hx {message}"):
                mcu(packed, C, W, torch.zeros(1, more, 7))
            with pytest.raises(ValueError, match=f"context {message}"):
                mcu(packed, torch.zeros(more, 6), W)
