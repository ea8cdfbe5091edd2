"""`torch.onnx.export(dynamo=True)` of a module, or of a program of torch.export, with a unit
inside: the op is written as ONNX's Scan over the reference's steps.

Nothing is to be called: `import mmixer_kernels` registers it with the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .problem import Problem, Weights


def in_a_scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """The output `[G, T, B, H]` and h_n `[G, B, H]` of a call, for any T and B."""
    steps = problem.inputs[0].shape[0]
    loop = None if isinstance(steps, int) and steps == 1 else _scan  # A cell has nothing to scan.
    return reference.mcu_group(problem, loop=loop)


def _scan(
    step: Callable[..., tuple[Tensor, Tensor]],
    h: Tensor,
    f_tilde: Tensor,
    valid: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    has_context = weights.has_context
    sequences = [f_tilde] if valid is None else [f_tilde, valid]

    def body(h: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        now, tensors = operands[: len(sequences)], operands[len(sequences) :]
        (again,) = Weights.sets(tensors, 1, has_context)
        h, output = step(h, now[0], None if valid is None else now[1], again)
        return h, output.clone()  # A scan's outputs are different tensors.

    h_n, output = torch.ops.higher_order.scan(body, [h], sequences, tuple(weights.tensors()))
    return h_n, output


def _trace(
    mode: Any,
    op: Any,
    types: Sequence[type],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
) -> Any:
    """The op in a graph that is traced, for ONNX or for any other purpose."""
    if not torch.onnx.is_in_onnx_export():
        return mode.__torch_dispatch__(op, types, arguments, keywords)
    with mode:
        output, h_n = in_a_scan(Problem.of_flat(*arguments[: len(Problem._fields)]))
        return output, h_n, output.new_empty(0)


try:
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
except ImportError:  # The exporter then says that it knows no such op.
    pass
else:
    torch.library.register_torch_dispatch(
        "mmixer_kernels::mcu_forward", ProxyTorchDispatchMode, _trace
    )
