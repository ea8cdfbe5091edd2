"""What callers hand over: `nn.GRU`'s layouts brought to `[T, B, ...]` and back, and the checks.

Every message names the argument, what it is and what it must be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

if TYPE_CHECKING:
    from .reference import Weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXES = ("gated", "concat")


class Operands(NamedTuple):
    """One call's tensors, time first: input `[T, B, F]`, context `[B, C]`, hx `[B, H]`."""

    input: Tensor
    context: Tensor
    hx: Tensor | None
    lengths: Tensor | None


class Layout(NamedTuple):
    """How the caller lays out a sequence: how to bring it to `[T, B, ...]`, and results back."""

    batch_first: bool
    batched: bool
    packed: PackedSequence | None

    @classmethod
    def of(cls, input: Tensor | PackedSequence, batch_first: bool) -> Layout:
        if isinstance(input, PackedSequence):
            return cls(batch_first=False, batched=True, packed=input)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"input must be a Tensor or a PackedSequence, but is a {type(input).__name__}"
            )
        if input.ndim not in (2, 3):
            order = "[B, T, input_size]" if batch_first else "[T, B, input_size]"
            raise ValueError(
                f"input must be {order}, or [T, input_size] unbatched, "
                f"but has shape {list(input.shape)}"
            )
        batched = input.ndim == 3
        return cls(batch_first=batch_first and batched, batched=batched, packed=None)

    def arrange(
        self,
        input: Tensor | PackedSequence,
        context: Tensor,
        hx: Tensor | None,
        lengths: Tensor | None,
    ) -> Operands:
        """The caller's tensors with time first; views, except for a PackedSequence."""
        check_tensor("context", context)
        dims = 2 if self.batched else 1
        expected = "[B, context_size]" if self.batched else "[context_size] for unbatched input"
        if context.ndim != dims:
            raise ValueError(f"context must be {expected}, but has shape {list(context.shape)}")
        if hx is not None:
            check_tensor("hx", hx)
            if hx.ndim != dims + 1 or hx.shape[0] != 1:
                expected = "[1, B, H]" if self.batched else "[1, H] for unbatched input"
                raise ValueError(f"hx must be {expected}, but has shape {list(hx.shape)}")
            hx = hx.squeeze(0)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None when input is a PackedSequence")
            if input.sorted_indices is not None:
                if input.sorted_indices.numel() != context.shape[0]:
                    raise ValueError(
                        f"context must have one row a sequence of the PackedSequence, "
                        f"{input.sorted_indices.numel()}, but has shape {list(context.shape)}"
                    )
                context = context.index_select(0, input.sorted_indices)
                if hx is not None:
                    hx = hx.index_select(0, input.sorted_indices)
            in_order = PackedSequence(input.data, input.batch_sizes)
            padded, lengths = pad_packed_sequence(in_order)
            return Operands(padded, context, hx, lengths.to(padded.device))
        if not self.batched:
            if lengths is not None:
                raise ValueError("lengths must be None when input is unbatched: shorten the input")
            hx = None if hx is None else hx.unsqueeze(0)
            return Operands(input.unsqueeze(1), context.unsqueeze(0), hx, None)
        return Operands(input.transpose(0, 1) if self.batch_first else input, context, hx, lengths)

    def restore(self, output: Tensor, h_n: Tensor) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output `[T, B, H]` and h_n `[B, H]` in the caller's layout."""
        if self.packed is not None:
            lengths = (self.packed.batch_sizes[:, None] > torch.arange(h_n.shape[0])).sum(0)
            data = pack_padded_sequence(output, lengths).data
            result = PackedSequence(data, *self.packed[1:])
            if self.packed.unsorted_indices is not None:
                h_n = h_n.index_select(0, self.packed.unsorted_indices)
            return result, h_n.unsqueeze(0)
        if not self.batched:
            return output.squeeze(1), h_n
        return (output.transpose(0, 1) if self.batch_first else output), h_n.unsqueeze(0)


def check_tensor(name: str, value: object) -> Tensor:
    """The value itself; TypeError where it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, but is a {type(value).__name__}")
    return value


def check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, but is {size!r}")


def check_options(mix: str, eps: float) -> None:
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, but is {mix!r}")
    if not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, but is {eps!r}")


def check(operands: Operands, weights: Weights, mix: str, eps: float) -> None:
    """Shapes, dtypes and devices of a call with time first; input without T is one step.

    Raises:
        ValueError: a wrong shape, device, length, mix or eps. TypeError: a wrong dtype, or a
        weight that is no tensor.
    """
    input, context, hx, lengths = operands
    check_options(mix, eps)
    if input.dtype not in DTYPES:
        raise TypeError(
            "input must be float64, float32, bfloat16 or float16, but is "
            f"{_name(input.dtype)}: convert it with .float()"
        )
    steps, batch, input_size = input.shape if input.ndim == 3 else (1, *input.shape)
    if steps == 0 or batch == 0:
        raise ValueError(
            f"input must have at least one step and one sample, but has {steps} steps (T) "
            f"and {batch} samples (B)"
        )
    check_tensor("weight_f", weights.weight_f)
    check_tensor("weight_g", weights.weight_g)
    check_tensor("weight_r", weights.weight_r)
    if weights.weight_r.ndim != 2:
        raise ValueError(f"weight_r must be [H, H], but has shape {list(weights.weight_r.shape)}")
    hidden = weights.hidden_size
    if (weights.norm_weight is None) != (weights.norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given, or both be None")
    if weights.weight_f.shape[-1] != input_size:
        raise ValueError(
            f"input must have {weights.weight_f.shape[-1]} features (input_size), "
            f"but has {input_size}"
        )
    dtype, device = input.dtype, input.device
    _check_tensors(
        (("context", context, (batch, weights.weight_g.shape[-1])), ("hx", hx, (batch, hidden))),
        (dtype,),
        device,
    )
    square, norm = (hidden, hidden), (6, hidden)
    _check_tensors(
        (
            ("weight_f", weights.weight_f, (hidden, input_size)),
            ("weight_g", weights.weight_g, (hidden, weights.weight_g.shape[-1])),
            ("weight_s", weights.weight_s, (hidden, 2 * hidden)),
            ("weight_r", weights.weight_r, square),
            ("weight_z", weights.weight_z, square),
            ("weight_h", weights.weight_h, square),
            ("norm_weight", weights.norm_weight, norm),
            ("norm_bias", weights.norm_bias, norm),
        ),
        # Beside float32 features also bfloat16: half the memory to read at each step.
        (dtype, torch.bfloat16) if dtype is torch.float32 else (dtype,),
        device,
    )
    if lengths is not None:
        check_lengths(lengths, steps, batch, input)


def check_lengths(lengths: Tensor, steps: int, batch: int, input: Tensor) -> None:
    """lengths: integers `[B]` on input's device, in 1..T.

    The values are looked at only on a CPU outside torch.compile: elsewhere that would stop the
    device or break the graph.
    """
    check_tensor("lengths", lengths)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be int64 or int32, but is {_name(lengths.dtype)}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [B] = [{batch}], but has shape {list(lengths.shape)}")
    if lengths.device != input.device:
        raise ValueError(
            f"lengths must be on input's device, {input.device}, but is on {lengths.device}"
        )
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(lengths.min()) < 1 or int(lengths.max()) > steps:
        raise ValueError(
            f"lengths must be in 1..{steps} (T), but has values from {int(lengths.min())} "
            f"to {int(lengths.max())}"
        )


def _check_tensors(
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Each tensor that there is has its shape, one of the dtypes, input's first, and the device."""
    for name, value, shape in expected:
        if value is None and name in _OPTIONAL:
            continue
        tensor = check_tensor(name, value)
        if tensor.shape != shape:
            meaning = _MEANINGS.get(name, "H is weight_r's")
            raise ValueError(
                f"{name} must have shape {list(shape)} ({meaning}), but has {list(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{name} must have input's dtype, {', or '.join(map(_name, dtypes))}, "
                f"but is {_name(tensor.dtype)}: convert one of them with .to()"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on input's device, {device}, but is on {tensor.device}: "
                f"move one of them with .to()"
            )


_OPTIONAL = ("hx", "norm_weight", "norm_bias")
_MEANINGS = {
    "context": "[B, context_size]",
    "hx": "[B, H] for this input and hidden_size",
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
