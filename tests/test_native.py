"""The extension's calls take their fields by name, and name the one that is wrong."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mmixer_kernels import _native

TENSOR = torch.zeros(3)
NORMS = ("norm_weight", "norm_bias")
GROUP = {
    **dict.fromkeys([f"weight_{gate}" for gate in "fgsrzh"], TENSOR),
    **dict.fromkeys(("input", "context", *NORMS), TENSOR),
    **dict.fromkeys(("input_stride_step", "input_stride_sample", "input_size"), 1),
    **dict.fromkeys(("context_stride_sample", "context_size"), 1),
}


def problem(**other: Any) -> Any:
    sizes = dict.fromkeys(("steps", "batch", "hidden", "threads"), 1)
    dtypes = dict.fromkeys(("dtype", "weight_dtype", "norm_dtype"), torch.float32)
    rest = {"mix": "gated", "keep": "nothing", "eps": 1e-5, "hx": None, "lengths": None}
    strides = {"hx_stride_group": 0, "hx_stride_sample": 0}
    groups = [_native.Group(**GROUP)]
    fields = {"groups": groups, **sizes, **dtypes, **rest, **strides, **other}
    return _native.Problem(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"input": 1}, TypeError, "Problem has no input"),
        ({"hx": 0.5}, TypeError, "hx must be a tensor, an address or None, not 0.5"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, not 1.0"),
        ({"steps": 2**63}, ValueError, "steps is too large: 9223372036854775808"),
        ({"threads": 2**31}, ValueError, "threads is too large: 2147483648"),
        ({"eps": "1"}, TypeError, "eps must be a number, not '1'"),
        ({"mix": "sum"}, TypeError, "mix must be one of gated, concat, not 'sum'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of float32, .*, not torch.int8"),
        ({"groups": ()}, TypeError, r"groups must be a list, not \(\)"),
        ({"groups": [TENSOR]}, TypeError, "groups must be a Group, not tensor"),
        ({"groups": [_native.Group(input=TENSOR)]}, TypeError, "Group lacks input_stride_step"),
    ],
)
def test_a_wrong_field_is_named(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        problem(**fields)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ((), {}, "forward_workspace_size lacks problem"),
        ((problem(),), {}, "forward_workspace_size takes its fields by name alone"),
        ((), {"problem": None}, "problem must be a Problem, not None"),
        ((), {"problem": _native.Group(**GROUP)}, "problem must be a Problem, not <.*Group"),
        ((), {"problem": _native.Problem(steps=1).set(batch=1)}, "Problem lacks groups"),
    ],
)
def test_a_call_needs_every_field(
    arguments: tuple[Any, ...], fields: dict[str, Any], message: str
) -> None:
    assert _native.forward_workspace_size(problem=problem()) > 0
    with pytest.raises(TypeError, match=f"^{message}"):
        _native.forward_workspace_size(*arguments, **fields)


def test_a_tensors_own_error_passes() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        _native.Group(input=x)
        return x

    with pytest.raises(RuntimeError, match="storage"):
        torch.vmap(body)(torch.zeros(2, 3))


def test_nothing_is_kept_of_the_values() -> None:
    count = sys.getrefcount(TENSOR), sys.getrefcount(torch.float32)
    for _ in range(100):
        problem(hx=TENSOR)
        with pytest.raises(TypeError, match="Group"):
            problem(groups=[TENSOR])
    assert (sys.getrefcount(TENSOR), sys.getrefcount(torch.float32)) == count
