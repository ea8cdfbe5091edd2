"""The kernels of the triton engine. Shapes are those of `triton_pass`; statistics and states are
float32 or float64, operands of products have the inputs' dtype."""

from .products import products
from .recurrence import recurrence, recurrence_backward
from .rows import mix, mix_backward, norm_tanh, norm_tanh_backward, reset_gate, update_gate
from .step import step

__all__ = [
    "mix",
    "mix_backward",
    "norm_tanh",
    "norm_tanh_backward",
    "products",
    "recurrence",
    "recurrence_backward",
    "reset_gate",
    "step",
    "update_gate",
]
