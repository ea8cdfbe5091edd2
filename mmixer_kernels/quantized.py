"""`QuantizedMCUCell`: a cell whose weights are int8, for streaming on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import arguments, dispatch
from .engines import chosen, cpu
from .problem import Call, Step, Weights, gates
from .reference import MCU
from .unit import Unit

LARGEST = 127
"""The largest quantised value, and minus the smallest."""
MOST_COLUMNS = 132104
"""The most columns of a matrix, whose sums then fit in 32 bits."""


class QuantizedWeights(NamedTuple):
    """One weight set with int8 matrices, in the order in which the CPU engine takes it: those of
    `Weights`, where row n of a gate's stands for `scale[gate, n]` times its integers."""

    weight_f: Tensor
    weight_g: Tensor | None
    weight_s: Tensor | None
    weight_r: Tensor
    weight_z: Tensor
    weight_h: Tensor
    scale: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that there are."""
        return [tensor for tensor in self if tensor is not None]


class QuantizedMCUCell(nn.Module):
    """One step with int8 weights, which `FusedMCUCell.quantized()` makes: a quarter of the memory
    that a step has to read.

    Each row of a matrix has a scale of its own. At each step every product's operand is quantised
    too, each sample by its largest value: sums are exact integers. LayerNorm, gates and the state
    are float32, and so must input, context and hx be. There are no gradients.

    On a CPU the engine's kernels compute; what they write is the same for any number of threads.
    The same equations in plain PyTorch, at many times their time, serve `engine="reference"`,
    an installation without the extension (which warns), and whatever looks on at a call: compilers,
    exporters, modes, autocast. Other engines, and with them GPUs, are refused.

    The state_dict has the matrices `weight_f` to `weight_h` in int8, `scale` `[6, H]`, rows in the
    order f g s r z h (without context `[4, H]`, f r z h), `norm_weight` and `norm_bias` in float32.
    They are buffers: `.to(device)` moves them, and another dtype is refused, also by
    `load_state_dict`, which then loads nothing. A `FusedMCUStack` has no quantised form.

    Args:
        unit: the cell, or the sequence unit, whose weights are quantised, from any dtype. They are
            copied; mix, eps and engine are taken over.

    Raises:
        ValueError: weights that are not finite, or matrices of more than 132104 columns.
        TypeError: what is no unit.
    """

    weight_f: Tensor
    weight_g: Tensor | None
    weight_s: Tensor | None
    weight_r: Tensor
    weight_z: Tensor
    weight_h: Tensor
    scale: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    bidirectional = False
    _names = QuantizedWeights._fields

    def __init__(self, unit: MCU) -> None:
        super().__init__()
        if not isinstance(unit, MCU):
            raise TypeError(
                "unit must be a FusedMCUCell, a FusedMCU or a reference.MCU, but is a "
                f"{type(unit).__name__}"
            )
        self.input_size, self.context_size = unit.input_size, unit.context_size
        self.hidden_size, self.layer_norm = unit.hidden_size, unit.layer_norm
        self.mix, self.eps = unit.mix, unit.eps
        self.engine: str = getattr(unit, "engine", "auto")
        widest = max(self.input_size, self.context_size, self.hidden_size)
        if widest > MOST_COLUMNS:
            raise ValueError(
                f"input_size, context_size and hidden_size must be at most {MOST_COLUMNS} to be "
                f"quantised, whose sums have 32 bits, but one is {widest}"
            )
        weights = unit.weights().map(lambda x: x.detach().float())
        scales = []
        for name, tensor in weights._asdict().items():
            if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
                raise ValueError(
                    f"{name} must be finite in float32 to be quantised, but is not: train with a "
                    "smaller learning rate, or quantise an earlier checkpoint"
                )
            if name.startswith("weight") and tensor is not None:
                integers, scale = quantize(tensor)
                scales.append(scale.squeeze(-1))
                tensor = integers.to(torch.int8)
            elif tensor is not None:
                tensor = tensor.clone()
            if name == "norm_weight":
                self.register_buffer("scale", torch.stack(scales))
            self.register_buffer(name, tensor)

    def weights(self) -> QuantizedWeights:
        """The buffers as one weight set."""
        buffers: Any = self._buffers  # An nn.Module's attributes take microseconds.
        if tuple(buffers) == self._names:
            return QuantizedWeights._make(buffers.values())
        return QuantizedWeights._make(getattr(self, name) for name in self._names)

    def forward(
        self, input: Tensor, context: Tensor | None = None, hx: Tensor | None = None
    ) -> Tensor:
        """One step.

        Args:
            input: `[B, input_size]`, or `[input_size]` unbatched; float32.
            context: `[B, context_size]`, or `[context_size]` unbatched. A cell without context
                takes hx in its place, as `nn.GRUCell` does.
            hx: `[B, H]` (`[H]` unbatched), zeros when None.

        Returns:
            The next state `[B, H]` (`[H]` unbatched).

        Raises:
            ValueError: a wrong shape or device, what requires a gradient, or an engine without
                int8 weights.
            TypeError: a wrong dtype, or what is no tensor.
            RuntimeError: the engine asked for cannot run here.
        """
        if not self.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        arguments.check_tensor("input", input)
        weights = self.weights()
        # An engine takes the tensors of a step, whatever its weights are.
        step = Step(input, context, cast(Weights, weights), hx, self.mix, self.eps)
        engine = chosen(self.engine, input).NAME
        if engine == cpu.NAME and input.dim() == 2:
            next_state = _native_step(step)
            if next_state is not None:
                return next_state
        if engine not in (cpu.NAME, "reference"):
            raise ValueError(
                f'engine must be "cpu" or "reference" for int8 weights, but is "{engine}" for '
                f"tensors on {input.device}: move cell and operands to the CPU, or set "
                'cell.engine = "reference"'
            )
        operands = {"input": input, "context": context, "hx": hx}
        self._check({name: x for name, x in operands.items() if x is not None})
        if input.dim() == 1:
            batched = (None if x is None else x.unsqueeze(0) for x in (input, context, hx))
            return self(*batched).squeeze(0)
        arguments.check_step(step._replace(weights=_stand_ins(weights)))
        if engine == cpu.NAME:
            dense = (None if x is None else x.contiguous() for x in (input, context, hx))
            input, context, hx = cast(tuple[Tensor, Tensor | None, Tensor | None], tuple(dense))
            next_state = _native_step(step._replace(input=input, context=context, hx=hx))
            if next_state is not None:
                return next_state
        return reference_step(step, weights)

    def _check(self, operands: dict[str, Tensor]) -> None:
        """Raises for what a step with int8 weights takes less of than others."""
        for name, operand in operands.items():
            arguments.check_tensor(name, operand)
            if operand.dtype != torch.float32:
                raise TypeError(
                    f"{name} must be float32 beside int8 weights, but is "
                    f"{str(operand.dtype).removeprefix('torch.')}: convert it with .float()"
                )
            has_tangent = forward_ad.unpack_dual(operand).tangent is not None
            if has_tangent or (operand.requires_grad and torch.is_grad_enabled()):
                raise ValueError(
                    f"{name} must not require a gradient, since int8 weights give none, but does: "
                    "call the cell inside torch.no_grad(), or train the cell that it was made of"
                )
            dims = operands["input"].dim()
            if dims not in (1, 2) or operand.dim() != dims:
                size = {"input": "input_size", "context": "context_size", "hx": "H"}[name]
                raise ValueError(
                    f"{name} must be [B, {size}], or [{size}] unbatched as all operands then are, "
                    f"but has shape {list(operand.shape)}"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(torch.empty(0, dtype=torch.float32, device=self.scale.device)).dtype
        if dtype != torch.float32:
            raise TypeError(
                "A QuantizedMCUCell has int8 weights beside float32 scales and norms, and cannot "
                f"become {dtype}: convert the cell that it was made of, or leave this one as it is"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # nn.Module would round a float matrix to integers, without its scale.
        wrong = [
            f"{prefix}{name} must be {own.dtype}, but is {given.dtype}"
            for name, own in self._buffers.items()
            if own is not None
            and isinstance(given := state_dict.get(prefix + name), Tensor)
            and given.dtype != own.dtype
        ]
        if wrong:
            error_msgs += [
                *wrong,
                "load the state_dict of a QuantizedMCUCell, or load this one into a FusedMCUCell "
                "and quantise that",
            ]
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    __prepare_scriptable__ = Unit.__prepare_scriptable__

    def extra_repr(self) -> str:
        """The sizes, the weights' dtype, and the options that are not at their defaults."""
        text = f"{self.input_size}, {self.context_size}, {self.hidden_size}, weights=int8"
        for name, default in MCU._defaults.items():
            value = getattr(self, name, default)
            if value != default:
                text += f", {name}={value!r}"
        return text if self.engine == "auto" else f"{text}, engine={self.engine!r}"


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of each row of x, as floats, and its scale: x is about integers times scale.

    As csrc/cpu/int8.h has it: rounded to the nearest, halves to even; all 0 for a row of zeros; NaN
    for one that is not finite.
    """
    largest = x.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, LARGEST) / largest
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return torch.round(x * factor), largest / LARGEST


def linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x `[B, K]` times an int8 matrix `[N, K]` whose rows have the scales `[N]`.

    float64 adds the integers without rounding.
    """
    integers, scale_of_x = quantize(x)
    sums = integers.double() @ weight.double().T
    return sums.to(x.dtype) * (scale * scale_of_x)


def reference_step(step: Step, w: QuantizedWeights) -> Tensor:
    """Equations 7-14 with int8 weights: the truth of the CPU engine's kernels."""
    input, context, _, hx, mix, eps = step
    rows = gates(context is not None)
    H = w.weight_r.shape[0]
    scales = dict(zip(rows, w.scale, strict=True))

    def norm(a: Tensor, gate: str) -> Tensor:
        if w.norm_weight is None or w.norm_bias is None:
            return a
        row = rows.index(gate)
        return F.layer_norm(a, a.shape[-1:], w.norm_weight[row], w.norm_bias[row], eps)

    x = f_bar = torch.tanh(norm(linear(input, w.weight_f, scales["f"]), "f"))  # Eq. 7
    if context is not None and w.weight_g is not None and w.weight_s is not None:
        g_bar = torch.tanh(norm(linear(context, w.weight_g, scales["g"]), "g"))  # Eq. 8
        of_f, of_g = w.weight_s[:, :H], w.weight_s[:, H:]
        a_s = linear(f_bar, of_f, scales["s"]) + linear(g_bar, of_g, scales["s"])
        mixed = norm(a_s, "s")
        s = torch.sigmoid(mixed)  # Eq. 9
        x = s * f_bar + (1 - s) * g_bar if mix == "gated" else mixed  # Eq. 10
    h = torch.zeros_like(x) if hx is None else hx
    r = torch.sigmoid(norm(linear(x + h, w.weight_r, scales["r"]), "r"))  # Eq. 11
    z = torch.sigmoid(norm(linear(x + h, w.weight_z, scales["z"]), "z"))  # Eq. 12
    h_tilde = torch.tanh(norm(linear(r * h + x, w.weight_h, scales["h"]), "h"))  # Eq. 14
    return z * h_tilde + (1 - z) * h  # Eq. 13


def _native_step(step: Step) -> Tensor | None:
    """The CPU engine's; None where something looks on, or the operands do not fit as they are."""
    tensors = step.tensors()
    kind = dispatch.plain(tensors)
    if kind is None or kind.needs_gradient or not kind.is_on_one_device:
        return None
    try:
        return cpu.run_forward(Call(step.form(), "nothing", "step"), tensors)[0]
    except (IndexError, TypeError, ValueError):
        return None


def _stand_ins(weights: QuantizedWeights) -> Weights:
    """Float weights of the same shapes, for checks."""
    zero = weights.scale.new_zeros(())
    operands = {k: x for k, x in weights._asdict().items() if k != "scale"}
    stand_ins: dict[str, Any] = {
        name: None if x is None else zero.expand(x.shape) for name, x in operands.items()
    }
    return Weights(**stand_ins)
