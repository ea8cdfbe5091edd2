"""`FusedMCU` and `FusedMCUCell`: the MCU as modules, evaluated by an engine."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import arguments, functional
from .engines import check_name
from .quantized import QuantizedMCUCell
from .reference import MCU


class FusedMCU(MCU):
    """Multi-modal Contextualization Unit (Eq. 7-14) where `nn.GRU` would stand.

    Args:
        input_size: d_f, the size of a step's features.
        context_size: (N-1) d_c, the size of the action content of the other modalities. 0 is a
            unit without context: Eq. 8-10 fall away, f_tilde is f_bar, and mix is not used.
        hidden_size: d_h.
        layer_norm: False replaces every LN by the identity.
        mix: "gated" is Eq. 9-10; "concat" is Table 3's experiment II, LN(W_s [f_bar || g_bar]).
        batch_first: input and output are `[B, T, ...]` instead of `[T, B, ...]`.
        eps: added to LayerNorm's variance.
        init: the initial values of the recurrent weights, `weight_r`, `weight_z` and `weight_h`:
            "uniform" as in `nn.GRU`, or "orthogonal", each a random orthogonal matrix.
        engine: "auto" or the name of an engine, see `mmixer_kernels.engines()`; the environment
            variable MMIXER_ENGINE overrides "auto".
        recompute: save only the states for backward, see `functional.mcu`.
        device: where the parameters are.
        dtype: the parameters' dtype.

    Raises:
        ValueError: a size below 1 (context_size: below 0), an unknown mix, init or engine, or an
            eps that is not positive.
        TypeError: a dtype that is not float64, float32, bfloat16 or float16, or a layer_norm,
            batch_first or recompute that is no bool.

    Parameters are `reference.MCU`'s: state_dicts move both ways.

    Examples:
        >>> unit = FusedMCU(64, 64, 128)
        >>> output, h_n = unit(torch.randn(16, 8, 64), torch.randn(8, 64))
        >>> output.shape, h_n.shape
        (torch.Size([16, 8, 128]), torch.Size([1, 8, 128]))

        >>> unit = FusedMCU(64, 0, 128)  # without context
        >>> output, h_n = unit(torch.randn(16, 8, 64))
    """

    _defaults: ClassVar[dict[str, object]] = {
        **MCU._defaults,
        "engine": "auto",
        "recompute": False,
    }

    def __init__(
        self,
        input_size: int,
        context_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = True,
        mix: str = "gated",
        batch_first: bool = False,
        eps: float = 1e-5,
        init: str = "uniform",
        engine: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            context_size,
            hidden_size,
            layer_norm=layer_norm,
            mix=mix,
            batch_first=batch_first,
            eps=eps,
            init=init,
            device=device,
            dtype=dtype,
        )
        check_name(engine)
        arguments.check_bool("recompute", recompute)
        self.engine, self.recompute = engine, recompute

    def forward(
        self,
        input: Tensor | PackedSequence,
        context: Tensor | None = None,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Encodes a sequence in the light of `context`.

        Args:
            input: `[T, B, input_size]`, `[B, T, input_size]` when batch_first,
                `[T, input_size]` unbatched, or a PackedSequence; in the parameters' dtype, or
                float32 beside bfloat16 parameters.
            context: `[B, context_size]`, or `[context_size]` unbatched. A unit without context
                takes hx in its place, as `nn.GRU` does.
            hx: initial state `[1, B, H]` (`[1, H]` unbatched), zeros when None.
            lengths: integers `[B]` in 1..T: past a sample's length the input is not used, the
                output is 0 and h_n is the sample's own last valid step.

        Returns:
            output, like input with H features, and h_n `[1, B, H]` (`[1, H]` unbatched).

        Raises:
            ValueError: a wrong shape, device or length.
            TypeError: a wrong dtype, or what is no tensor.
            RuntimeError: the engine asked for cannot run here.
        """
        if not self.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        return functional.mcu(
            input,
            context,
            self.weights(),
            hx,
            lengths,
            mix=self.mix,
            batch_first=self.batch_first,
            eps=self.eps,
            engine=self.engine,
            recompute=self.recompute,
        )

    def quantized(self) -> QuantizedMCUCell:
        """A `QuantizedMCUCell`: a step of this unit, with a copy of its weights in int8."""
        return QuantizedMCUCell(self)


class FusedMCUCell(MCU):
    """One step of `FusedMCU`, for streaming; the same parameters, and the same arguments but
    batch_first and recompute.

    A step's time is that of reading the weights: with `cell.bfloat16()` and float32 features and
    states it is about half on a CPU, at the precision of bfloat16 weights; `cell.quantized()` has
    them in int8.

    Examples:
        >>> cell = FusedMCUCell(64, 64, 128)
        >>> hx = cell(torch.randn(1, 64), torch.randn(1, 64))
        >>> hx.shape
        torch.Size([1, 128])
    """

    def __init__(
        self,
        input_size: int,
        context_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = True,
        mix: str = "gated",
        eps: float = 1e-5,
        init: str = "uniform",
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            context_size,
            hidden_size,
            layer_norm=layer_norm,
            mix=mix,
            eps=eps,
            init=init,
            device=device,
            dtype=dtype,
        )
        check_name(engine)
        self.engine = engine

    def forward(  # type: ignore[override]
        self, input: Tensor, context: Tensor | None = None, hx: Tensor | None = None
    ) -> Tensor:
        """One step.

        Args:
            input: `[B, input_size]`, or `[input_size]` unbatched; in the parameters' dtype, or
                float32 beside bfloat16 parameters.
            context: `[B, context_size]`, or `[context_size]` unbatched. A cell without context
                takes hx in its place, as `nn.GRUCell` does.
            hx: `[B, H]` (`[H]` unbatched), zeros when None.

        Returns:
            The next state `[B, H]` (`[H]` unbatched).

        Raises:
            ValueError: a wrong shape or device.
            TypeError: a wrong dtype, or what is no tensor.
            RuntimeError: the engine asked for cannot run here.
        """
        if not self.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        return functional.mcu_cell(
            input,
            context,
            self.weights(),
            hx,
            mix=self.mix,
            eps=self.eps,
            engine=self.engine,
        )

    def quantized(self) -> QuantizedMCUCell:
        """The cell with a copy of its weights in int8, for streaming: see `QuantizedMCUCell`.

        Examples:
            >>> cell = FusedMCUCell(64, 64, 128).quantized()
            >>> cell(torch.randn(1, 64), torch.randn(1, 64)).shape
            torch.Size([1, 128])
        """
        return QuantizedMCUCell(self)
