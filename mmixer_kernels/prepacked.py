"""Sequences of an unchanged unit, of which each is short: its weights are packed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from . import arguments, dispatch
from .engines import chosen, native
from .modules import FusedMCU
from .problem import Call, Form
from .unit import SeenParameters


class PrepackedMCU:
    """Calls a `FusedMCU` without gradients, on a CPU with its weights packed once.

    The CPU engine lays weights out for its products ("packs" them) at the begin of a call: with 16
    steps of 8 samples a tenth of the time, and more the fewer rows there are, as where a stream
    comes in chunks. This keeps them packed from one call to the next: `(input_size + 4 H) H`
    numbers in float32 or float64, without context 3 for 4. Results are those of the unit, to the
    bits.

    Parameters may change and move: the next call packs them anew. But PyTorch does not count the
    changes that are made by `.data`, by optimizers with `fused=True`, or by another owner of the
    memory, such as NumPy: call `repack` after these. A call is the unit's where there is nothing to
    gain or somebody looks on: with other engines, inputs in bfloat16 or float16, unbatched or as a
    PackedSequence; and where hooks, modes, autocast, compilers, transforms or a profiler do.

    Args:
        unit: whose parameters and options every call takes as they are then.

    Raises:
        TypeError: what is no FusedMCU.

    Examples:
        >>> unit = PrepackedMCU(FusedMCU(64, 64, 128))
        >>> context, h_n = torch.randn(1, 64), None
        >>> for chunk in torch.randn(10, 4, 1, 64):
        ...     output, h_n = unit(chunk, context, h_n)
        >>> output.shape, h_n.shape
        (torch.Size([4, 1, 128]), torch.Size([1, 1, 128]))
    """

    def __init__(self, unit: FusedMCU) -> None:
        if not isinstance(unit, FusedMCU):
            raise TypeError(f"unit must be a FusedMCU, but is a {type(unit).__name__}")
        self.unit = unit
        self._packed: _Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs the parameters that were copied with it."""
        return {"unit": self.unit, "_packed": None}

    def repack(self) -> None:
        """Lets the next call pack the parameters, whether a change of them is known or not."""
        self._packed = None

    def __call__(
        self,
        input: Tensor | PackedSequence,
        context: Tensor | None = None,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output and h_n of `FusedMCU.forward`, which says what the arguments are.

        Raises:
            ValueError: as the unit, and for an input, context or hx that requires a gradient.
            TypeError: as the unit.
            RuntimeError: as the unit.
        """
        results = self._run(input, context, hx, lengths)
        if results is not None:
            return results
        features = input.data if isinstance(input, PackedSequence) else input
        for name, operand in {"input": features, "context": context, "hx": hx}.items():
            if torch.is_grad_enabled() and getattr(operand, "requires_grad", False):
                raise ValueError(
                    f"{name} must not require a gradient, since a PrepackedMCU computes none, but "
                    "does: call it inside torch.no_grad(), or call the unit instead"
                )
        with torch.no_grad():
            called: tuple[Tensor | PackedSequence, Tensor] = self.unit(input, context, hx, lengths)
            return called

    def _run(self, input: Any, context: Any, hx: Any, lengths: Any) -> tuple[Tensor, Tensor] | None:
        """The results; None, and nothing is done, where the unit has to be called."""
        unit = self.unit
        operands = [input, *(x for x in (context, hx, lengths) if x is not None)]
        if has_torch_function(operands) or type(unit) is not FusedMCU:
            return None
        kind = dispatch.plain(operands)
        if kind is None or kind.needs_gradient or not kind.is_on_one_device or not input.is_cpu:
            return None
        if not dispatch.is_forward_alone(unit):
            return None
        if not unit.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        try:
            return self._run_plain(input, context, hx, lengths)
        except (TypeError, ValueError):  # The unit converts what is wrong, or says what that is.
            return None

    def _run_plain(
        self, input: Tensor, context: Tensor | None, hx: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """`_run` of operands that nothing looks on at."""
        unit, packed = self.unit, self._packed
        engine = chosen(unit.engine, input)
        if not hasattr(engine, "prepack"):
            return None
        if packed is not None and not packed.parameters.are(unit._parameters):
            packed = None
        parameters = SeenParameters(unit._parameters) if packed is None else packed.parameters
        own = parameters.tensors
        are_there = context is not None, hx is not None, lengths is not None
        form = Form(1, len(own), *are_there, unit.mix, unit.eps)
        call = Call(form, "nothing", "sequence", unit.batch_first)
        tensors = [x for x in (input, context, *own, hx, lengths) if x is not None]
        if packed is None:
            run = engine.prepack(call, tensors) if _can_be_packed(unit, parameters) else None
            self._packed = packed = _Packed(parameters, run)
        if packed.run is None:
            return None
        output, h_n, _ = packed.run(call, tensors)
        assert h_n is not None  # as it is no step
        return output, h_n


class _Packed(NamedTuple):
    """The parameters that the CPU engine has packed, for run; run is None where it cannot."""

    parameters: SeenParameters
    run: native.Forward | None


def _can_be_packed(unit: FusedMCU, parameters: SeenParameters) -> bool:
    """Whether they are plain tensors of the CPU whose changes PyTorch counts."""
    if not parameters.are_counted or tuple(unit._parameters) != unit._names:
        return False
    kind = dispatch.plain(parameters.tensors)
    return kind is not None and kind.is_on_one_device and parameters.tensors[0].is_cpu
