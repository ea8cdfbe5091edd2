"""The rules of `torch.vmap` for the ops: a batch of N calls becomes one call.

The samples of all calls are samples of the one call. Where the calls have weights of their own, or
want gradients of the weights for each, they are its groups: N calls of G groups are one of G N.
Only calls that also have lengths of their own run one after another, as a call has one `lengths`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_Dim = int | None  # of the batch of calls in a tensor, if it has any


def forward(
    run_forward: Callable[..., Any], info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[Any, Any]:
    """The rule of `mcu_forward`, which is `run_forward` or has its arguments. Nothing is saved for
    `backward`, which computes it again."""
    operands, (*options, keep) = arguments[:5], arguments[5:]

    def call(*operands: Any) -> tuple[Tensor, Tensor]:
        inputs, contexts, weights, hx, _ = operands
        tensors = [*inputs, *contexts, *weights, *([] if hx is None else [hx])]
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        kept = keep if needs_gradient else "nothing"
        output, h_n, _ = run_forward(*operands, *options, kept)
        return output, h_n

    calls = _Calls.of(info, in_dims, operands)
    if calls is None:
        (output, h_n), dims = _one_after_another(call, info, in_dims, operands)
    else:
        output, h_n = call(*calls.join_operands(in_dims, operands))
        (output, h_n), dims = zip(calls.split(output, 2), calls.split(h_n, 1), strict=True)
    return (output, h_n, output.new_empty(0)), (*dims, None)


def backward(
    run_forward: Callable[..., Any],
    run_backward: Callable[..., Any],
    info: Any,
    in_dims: Sequence[Any],
    *arguments: Any,
) -> tuple[Any, Any]:
    """The rule of `mcu_backward`, which is `run_backward` or has its arguments."""
    grad_output, grad_h_n, _, *operands = arguments[:8]
    *options, need_input, need_weights = arguments[8:]
    dims = in_dims[3:8]

    def call(grad_output: Tensor, grad_h_n: Tensor, *operands: Any) -> Any:
        forward_arguments = *operands, *options
        saved = run_forward(*forward_arguments)[2]
        return run_backward(
            grad_output, grad_h_n, saved, *forward_arguments, need_input, need_weights
        )

    calls = _Calls.of(info, dims, operands, need_weights)
    if calls is None:
        tensors = grad_output, grad_h_n, *operands
        return _one_after_another(call, info, (*in_dims[:2], *dims), tensors)
    grad_inputs, grad_contexts, grad_weights, grad_hx = call(
        calls.join(grad_output, in_dims[0], 2),
        calls.join(grad_h_n, in_dims[1], 1),
        *calls.join_operands(dims, operands),
    )
    results = (
        calls.split_list(grad_inputs, 1),
        calls.split_list(grad_contexts, 0),
        calls.split_list(grad_weights, None),
        calls.split(grad_hx, 1),
    )
    tensors, dims = zip(*results, strict=True)
    return tensors, dims


def backward_of_batched_gradients(
    run_forward: Callable[..., Any], run_backward: Callable[..., Any], *arguments: Any
) -> Any:
    """`mcu_backward` inside the vmap of `torch.autograd.grad(is_grads_batched=True)`, which is one
    of its own, older than `torch.vmap`, and has no rules for operators of libraries."""
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        # The batch of this level comes first; tensors without it get one of size 1.
        exposed = pytree.tree_map_only(
            Tensor, lambda tensor: torch._remove_batch_dim(tensor, level, 1, 0), arguments
        )
        count = max(len(leaf) for leaf in pytree.tree_leaves(exposed) if isinstance(leaf, Tensor))
        one = pytree.tree_map_only(
            Tensor, lambda tensor: tensor[0] if len(tensor) == 1 else tensor, exposed
        )
        if count == 1:
            return run_backward(*one)
        in_dims = pytree.tree_map(
            lambda leaf: 0 if isinstance(leaf, Tensor) and len(leaf) == count else None, exposed
        )
        results, dims = backward(run_forward, run_backward, _Info(count), in_dims, *one)
        return pytree.tree_map(
            lambda tensor, dim: torch._add_batch_dim(tensor, dim, level), results, dims
        )
    finally:
        torch._C._vmapmode_increment_nesting()


class _Info(NamedTuple):
    """The size of a vmap, as its rules are told it."""

    batch_size: int


class _Calls(NamedTuple):
    """N calls of G groups, joined as groups of one call or as its samples."""

    number: int
    groups: int
    as_groups: bool

    @classmethod
    def of(
        cls, info: Any, dims: Sequence[Any], operands: Sequence[Any], need_weights: bool = False
    ) -> _Calls | None:
        """The joined calls; None where they cannot be joined."""
        as_groups = need_weights or any(dim is not None for dim in dims[2])
        if as_groups and dims[4] is not None:
            return None
        return cls(info.batch_size, len(operands[0]), as_groups)

    def join_operands(self, dims: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        inputs, contexts, weights, hx, lengths = operands
        return [
            self.join_list(inputs, dims[0], 1),
            self.join_list(contexts, dims[1], 0),
            self.join_list(weights, dims[2], None),
            None if hx is None else self.join(hx, dims[3], 1),
            lengths if lengths is None or self.as_groups else self.join(lengths, dims[4], 0),
        ]

    def join(self, tensor: Tensor, dim: _Dim, samples: int) -> Tensor:
        """One tensor of all calls, whose dimension `samples` counts samples, and 0 groups."""
        at = 1 if self.as_groups else samples
        if dim is None:
            shape = [*tensor.shape[:at], self.number, *tensor.shape[at:]]
            tensor = tensor.unsqueeze(at).expand(shape)
        else:
            tensor = tensor.movedim(dim, at)
        return tensor.flatten(0, 1) if self.as_groups else tensor.flatten(at, at + 1)

    def join_list(
        self, tensors: Sequence[Tensor], dims: Sequence[_Dim], samples: int | None
    ) -> list[Tensor]:
        """A list of all calls, with as many tensors per group; `samples` as in `join`, or None."""
        if self.as_groups:
            return [
                tensor if dim is None else tensor.select(dim, call)
                for group in _chunks(list(zip(tensors, dims, strict=True)), self.groups)
                for call in range(self.number)
                for tensor, dim in group
            ]
        if samples is None:
            return list(tensors)
        return [self.join(*pair, samples) for pair in zip(tensors, dims, strict=True)]

    def split(self, tensor: Tensor, samples: int) -> tuple[Tensor, int]:
        """`join` backward, and the dimension of the calls."""
        if self.as_groups:
            return tensor.unflatten(0, (self.groups, self.number)), 1
        sizes = self.number, tensor.shape[samples] // self.number
        return tensor.unflatten(samples, sizes), samples

    def split_list(
        self, tensors: Sequence[Tensor], samples: int | None
    ) -> tuple[list[Tensor], list[int]]:
        """`join_list` backward, and the dimensions of the calls."""
        if self.as_groups:
            stacked = [
                torch.stack(tensors_of_calls)
                for group in _chunks(tensors, self.groups)
                for tensors_of_calls in zip(*_chunks(group, self.number), strict=True)
            ]
            return stacked, [0] * len(stacked)
        pairs = [self.split(tensor, samples) for tensor in tensors if samples is not None]
        return [tensor for tensor, _ in pairs], [dim for _, dim in pairs]


def _chunks(values: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """`count` parts of equal length."""
    size = len(values) // count
    return [values[i * size : (i + 1) * size] for i in range(count)]


def _one_after_another(
    call: Callable[..., Any], info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """The results of the calls, stacked, and their dimensions of the calls."""

    def one(i: int) -> Any:
        dims = list(in_dims[: len(arguments)])
        return call(
            *pytree.tree_map(
                lambda x, dim: x if dim is None else x.select(dim, i), list(arguments), dims
            )
        )

    results = [one(i) for i in range(info.batch_size)]
    stacked = pytree.tree_map(lambda *tensors: torch.stack(tensors), *results)
    return stacked, pytree.tree_map(lambda _: 0, stacked)
