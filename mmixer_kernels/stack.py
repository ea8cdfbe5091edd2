"""`FusedMCUStack`: layers and directions, as `nn.GRU` has them."""

from __future__ import annotations

import warnings
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import arguments, dispatch, functional
from .engines import check_name
from .problem import Weights
from .unit import Unit


class FusedMCUStack(Unit):
    """Layers of MCUs in one or both directions, where a deep or bidirectional `nn.GRU` would stand.

    Each layer's input is the output of the layer below; each gets the same context. The two
    directions of a layer are one call of the engine.

    Args:
        input_size: the size of a step's features.
        context_size: the size of the context; 0 for none, as in `FusedMCU`.
        hidden_size: H, of each layer and direction.
        num_layers: L.
        bidirectional: a second weight set of each layer runs from each sample's own last step to
            its first; D below is 2 instead of 1.
        dropout: the probability with which each layer's output but the last's is dropped in
            training; the values come from PyTorch's default generator, as `nn.GRU`'s do.
        batch_first: as in `FusedMCU`.
        layer_norm: likewise.
        mix: likewise.
        eps: likewise.
        init: likewise.
        engine: likewise.
        recompute: likewise.
        device: likewise.
        dtype: likewise.

    Raises:
        ValueError: a size below 1 (context_size: below 0), a dropout outside of 0..1, an unknown
            mix, init or engine, or an eps that is not positive.
        TypeError: a dtype that is not float64, float32, bfloat16 or float16, or a bidirectional,
            layer_norm, batch_first or recompute that is no bool.

    A dropout beside a single layer, which has nothing to drop, gives a UserWarning, as `nn.GRU`'s
    does. Parameters are those of `FusedMCU` with `nn.GRU`'s suffixes: `weight_f_l0` of the first
    layer, `weight_f_l0_reverse` of its second direction, and so on. The first layer's weight_f is
    `[H, input_size]`, that of the others `[H, D H]`.

    Examples:
        >>> stack = FusedMCUStack(64, 0, 128, num_layers=2, bidirectional=True)
        >>> output, h_n = stack(torch.randn(16, 8, 64))
        >>> output.shape, h_n.shape
        (torch.Size([16, 8, 256]), torch.Size([4, 8, 128]))
    """

    _defaults: ClassVar[dict[str, object]] = {
        **Unit._defaults,
        "num_layers": 1,
        "bidirectional": False,
        "dropout": 0.0,
        "engine": "auto",
        "recompute": False,
    }

    def __init__(
        self,
        input_size: int,
        context_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        batch_first: bool = False,
        layer_norm: bool = True,
        mix: str = "gated",
        eps: float = 1e-5,
        init: str = "uniform",
        engine: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments.check_sizes({"hidden_size": hidden_size, "num_layers": num_layers})
        arguments.check_bool("bidirectional", bidirectional)
        arguments.check_bool("recompute", recompute)
        _check_dropout(dropout, num_layers)
        check_name(engine)
        suffixes = ("", "_reverse") if bidirectional else ("",)
        super().__init__(
            input_size,
            context_size,
            hidden_size,
            {
                f"_l{layer}{suffix}": len(suffixes) * hidden_size if layer else input_size
                for layer in range(num_layers)
                for suffix in suffixes
            },
            layer_norm=layer_norm,
            mix=mix,
            batch_first=batch_first,
            eps=eps,
            init=init,
            device=device,
            dtype=dtype,
        )
        self.num_layers, self.bidirectional, self.dropout = num_layers, bidirectional, dropout
        self.engine, self.recompute = engine, recompute

    def weights(self) -> list[Weights]:
        """The weight sets in `nn.GRU`'s order: of each layer one, or one per direction."""
        fields, size = list(self._fields()), len(Weights._fields)
        return [Weights(*fields[i : i + size]) for i in range(0, len(fields), size)]  # type: ignore[arg-type]

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
            hx: initial states `[L D, B, H]` (`[L D, H]` unbatched), zeros when None.
            lengths: integers `[B]` in 1..T: past a sample's length the input is not used, the
                output is 0 and h_n is the state after the sample's own last valid step, of a
                second direction after its first.

        Returns:
            output, like input with D H features, and h_n `[L D, B, H]` (`[L D, H]` unbatched).

        Raises:
            ValueError: a wrong shape, device or length.
            TypeError: a wrong dtype, or what is no tensor.
            RuntimeError: the engine asked for cannot run here.
        """
        if not self.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        sets = self.weights()
        layout = None
        batch_first = self.batch_first
        is_step = self._is_step(input, lengths)
        if is_step or isinstance(input, PackedSequence):
            layout = arguments.Layout.of(input, batch_first)
            input, context, hx, lengths = layout.arrange(input, context, hx, lengths, len(sets))
            batch_first = False
        elif hx is not None and not isinstance(hx, torch.fx.Proxy):
            arguments.Layout.of(input, batch_first).check_states(hx, len(sets))
        output: Tensor = input
        directions = 2 if self.bidirectional else 1
        states = []
        for first in range(0, len(sets), directions):
            if first and self.dropout:
                output = F.dropout(output, self.dropout, self.training)
            own_hx = None if hx is None else hx[first : first + directions]
            if is_step:
                output = self._step(output, context, sets[first], own_hx)
                states.append(output)
                continue
            result, h_n = functional.mcu(
                output,
                context,
                (sets[first], sets[first + 1]) if self.bidirectional else sets[first],
                own_hx,
                lengths,
                mix=self.mix,
                batch_first=batch_first,
                eps=self.eps,
                engine=self.engine,
                recompute=self.recompute,
            )
            output = cast(Tensor, result)  # as no layer's input is packed
            states.append(h_n)
        # Of a step, the last state is the output as well.
        h_n = states[0] if len(states) == 1 and not is_step else torch.cat(states)
        return (output, h_n) if layout is None else layout.restore(output, h_n)

    def _is_step(self, input: object, lengths: Tensor | None) -> bool:
        """Whether the engines' shorter way fits: a step of a stream, say. What is traced may be
        called with more steps."""
        return (
            not (self.bidirectional or torch.is_grad_enabled())
            and lengths is None
            and isinstance(input, Tensor)
            and input.dim() == 3
            and dispatch.is_plain([input])
            and input.shape[1 if self.batch_first else 0] == 1
        )

    def _step(
        self, input: Tensor, context: Tensor | None, weights: Weights, hx: Tensor | None
    ) -> Tensor:
        """Output `[1, B, H]` of a layer after input `[1, B, F]`."""
        state = functional.mcu_cell(
            input.squeeze(0),
            context,
            weights,
            None if hx is None else hx.squeeze(0),
            mix=self.mix,
            eps=self.eps,
            engine=self.engine,
        )
        return state.unsqueeze(0)


def _check_dropout(dropout: object, num_layers: int) -> None:
    """ValueError unless it is a probability; a UserWarning where nothing is dropped."""
    is_number = isinstance(dropout, int | float) and type(dropout) is not bool
    if not is_number or not 0 <= dropout <= 1:  # type: ignore[operator]
        raise ValueError(f"dropout must be a number in 0..1, but is {dropout!r}")
    if dropout and num_layers == 1:
        warnings.warn(
            f"dropout={dropout!r} has no effect with num_layers=1, as it stands between layers: "
            "leave it out, or drop the output yourself",
            stacklevel=3,
        )
