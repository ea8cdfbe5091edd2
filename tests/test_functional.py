"""Arguments of the functions that the modules do not give them."""

import pytest
import torch
from helpers import Size, problem

from mmixer_kernels.engines import of_device
from mmixer_kernels.functional import mcu

ENGINES = [engine.NAME for engine in of_device(torch.device("cpu"))]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


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
