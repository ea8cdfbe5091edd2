"""Arguments of the functions that the modules do not give them."""

from enum import Enum

import numpy
import pytest
import torch
from helpers import Size, problem

from mmixer_kernels.engines import of_device
from mmixer_kernels.functional import mcu, mcu_cell

ENGINES = [engine.NAME for engine in of_device(torch.device("cpu"))]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")
MIXES = Enum("MIXES", "gated")


@pytest.mark.parametrize("engine", ENGINES)
def test_some_weights_in_bfloat16(engine):
    p = problem(Size(4, 3, 5, 6, 7), dtype=torch.float32)
    weights = p.weights
    mixed = weights._replace(
        weight_r=weights.weight_r.bfloat16(), norm_bias=weights.norm_bias.bfloat16()
    )
    output, _ = mcu(p.input, p.context, mixed, engine=engine)
    expected, _ = mcu(p.input, p.context, mixed.map(torch.Tensor.float), engine=engine)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("eps", [1, numpy.float64(1)])
def test_eps_may_be_any_number(engine, eps):
    p = problem(Size(4, 3, 5, 6, 7))
    results = [mcu(p.input, p.context, p.weights, eps=e, engine=engine)[0] for e in (eps, 1.0)]
    assert torch.equal(*results)
    step = p.input[0], p.context, p.weights
    assert torch.equal(*(mcu_cell(*step, eps=e, engine=engine) for e in (eps, 1.0)))


@pytest.mark.parametrize("mix", ["a.gated", MIXES.gated])
def test_a_mix_is_named_in_full(mix):
    p = problem(Size(4, 3, 5, 6, 7))
    with pytest.raises(ValueError, match="mix must be one of gated, concat, but is"):
        mcu(p.input, p.context, p.weights, mix=mix)
