"""`torch.onnx.export(dynamo=True)` of a module, or of a program of torch.export, with a unit
inside: the op is written as ONNX's Scan over the reference's steps.

Nothing is to be called: `import mmixer_kernels` registers it with the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Weights, compute_dtype


def in_steps(
    inputs: Sequence[Tensor],
    contexts: Sequence[Tensor],
    weights: Sequence[Tensor],
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The op's output `[G, T, B, H]` and h_n `[G, B, H]` from its arguments, for any T and B; without
    gradients."""
    count = len(weights) // len(inputs)
    results = [
        _sequence(
            inputs[i],
            contexts[i],
            Weights(*weights[i * count : (i + 1) * count]),
            None if hx is None else hx[i],
            lengths,
            mix,
            eps,
        )
        for i in range(len(inputs))
    ]
    output, h_n = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    return output, h_n


def _sequence(
    input: Tensor,
    context: Tensor,
    weights: Weights,
    hx: Tensor | None,
    lengths: Tensor | None,
    mix: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One weight set: output `[T, B, H]` and h_n `[B, H]`."""
    steps, batch, _ = input.shape
    dtype = compute_dtype(input.dtype)

    def prepare(tensor: Tensor) -> Tensor:
        # The exporter runs the graph once more, where the derivative of a scan of any size fails.
        return tensor.detach().to(dtype)

    h_0 = input.new_zeros(batch, weights.hidden_size) if hx is None else hx
    sequences = [prepare(input)]
    if lengths is not None:  # What is left of them at each step.
        sequences.append(lengths - torch.arange(steps, device=lengths.device)[:, None])

    def step(h: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        left, (g, *w) = operands[: len(sequences) - 1], operands[len(sequences) - 1 :]
        output, h = reference.mcu(x[None], g, Weights(*w), h, *left, mix=mix, eps=eps)
        return h, output.squeeze(0)

    operands = [prepare(tensor) for tensor in (context, *weights.tensors())]
    h_n, output = torch.ops.higher_order.scan(step, [prepare(h_0)], sequences, tuple(operands))
    return output.to(input.dtype), h_n.to(input.dtype)


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
        output, h_n = in_steps(*arguments[:7])
        return output, h_n, output.new_empty(0)


try:
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
except ImportError:  # The exporter then says that it knows no such op.
    pass
else:
    torch.library.register_torch_dispatch(
        "mmixer_kernels::mcu_forward", ProxyTorchDispatchMode, _trace
    )
