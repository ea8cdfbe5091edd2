"""M-Mixer (Section 3.1) and the networks of the paper's ablations (Tables 1-4)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.modules.module as module_hooks
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import arguments, functional
from .engines import check_name
from .modules import FusedMCU
from .unit import INITS

UNITS = ("mcu", "gru", "lstm")
SUMMARIZERS = ("avg", "max", "gru")
CONTENTS = ("cross", "self", "none")
_OF_MCU = {
    "summarizer": "avg",
    "content": "cross",
    "mix": "gated",
    "layer_norm": True,
    "init": "uniform",
    "engine": "auto",
}
"""The options that only unit "mcu" uses, with their defaults."""
_FORWARD = FusedMCU.forward


class Summarizer(nn.Module):
    """Action Summarizing Operator (Eq. 2, Table 1): features `[B, T, D]` to a content `[B, D]`.

    Args:
        kind: "avg" and "max" pool over time; "gru" is the last state of an `nn.GRU`.
        size: D; d_c = d_f for every kind.
        device: where the parameters are.
        dtype: the parameters' dtype.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.check_choice("summarizer", kind, SUMMARIZERS)
        self.kind = kind
        self.gru = None
        if kind == "gru":
            self.gru = nn.GRU(size, size, batch_first=True, device=device, dtype=dtype)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The content `[B, D]`; lengths `[B]` leaves out the steps past each sample's own."""
        if self.gru is not None:
            return _last_state(self.gru, features, lengths)
        if lengths is None:
            return features.mean(1) if self.kind == "avg" else features.amax(1)
        steps = torch.arange(features.shape[1], device=features.device)
        valid = (steps < lengths[:, None]).unsqueeze(-1)
        if self.kind == "avg":
            return torch.where(valid, features, 0.0).sum(1) / lengths[:, None]
        return torch.where(valid, features, -torch.inf).amax(1)

    def extra_repr(self) -> str:
        """The kind."""
        return self.kind


class MMixer(nn.Module):
    """Modality Mixer network on feature sequences (Eq. 2-5).

    Args:
        feature_sizes: d_f of each of the N modalities: two or more for content "cross", and one or
            more for all else.
        num_classes: K.
        hidden_size: d_h.
        unit: "mcu", or Table 2's "gru" and "lstm": one per modality without action content.
        summarizer: ASO, "avg", "max" or "gru" (Table 1).
        content: "cross" gives each MCU the other modalities' contents (Eq. 3), "self" its own
            (Table 4's MCU-self). "none" is units without context, and no summarizers: the
            modalities meet in the classifier alone, as with the units of Table 2.
        mix: the MCU's, see `FusedMCU` (Table 3).
        layer_norm: likewise.
        init: likewise, of the recurrent weights.
        batch_first: features are `[B, T, d_f]` instead of `[T, B, d_f]`.
        engine: the MCU's engine.
        device: where the parameters are.
        dtype: the parameters' dtype.

    Units "gru" and "lstm" have no use for summarizer, content, mix, layer_norm, init and engine,
    and content "none" has none for summarizer and mix: they must be valid all the same, and a
    UserWarning names those that are not at their defaults.

    Raises:
        ValueError: too few modalities, a size below 1 or an unknown option.
        TypeError: feature_sizes that are no sequence, a layer_norm or batch_first that is no bool,
            or a dtype that is not float64, float32, bfloat16 or float16.

    `units` may be hooked, parametrised, sharded, compiled, wrapped or replaced like any modules:
    each is then called, as `unit(features, content, lengths=lengths)`, or with content "none" as
    `unit(features, lengths=lengths)`, with features `[T, B, d_f]` (`[B, T, d_f]` where
    `unit.batch_first` is True), and returns (output, h_n) with h_n `[1, B, hidden_size]`. While all
    are `FusedMCU` as they were made, with the same options, which are read from the units at each
    call, they are one call of the engine.

    Examples:
        >>> network = MMixer([512, 512], num_classes=60)
        >>> network([torch.randn(8, 16, 512), torch.randn(8, 16, 512)]).shape
        torch.Size([8, 60])
    """

    def __init__(
        self,
        feature_sizes: Sequence[int],
        num_classes: int,
        *,
        hidden_size: int = 512,
        unit: str = "mcu",
        summarizer: str = "avg",
        content: str = "cross",
        mix: str = "gated",
        layer_norm: bool = True,
        init: str = "uniform",
        batch_first: bool = True,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.check_sequence("feature_sizes", feature_sizes, "a sequence of sizes")
        sizes = list(feature_sizes)
        if not sizes:
            raise ValueError("feature_sizes must name one modality or more, but is empty")
        named = {f"feature_sizes[{i}]": size for i, size in enumerate(sizes)}
        arguments.check_sizes({**named, "num_classes": num_classes, "hidden_size": hidden_size})
        arguments.check_choice("unit", unit, UNITS)
        arguments.check_choice("content", content, CONTENTS)
        arguments.check_choice("summarizer", summarizer, SUMMARIZERS)
        arguments.check_choice("mix", mix, arguments.MIXES)
        arguments.check_choice("init", init, INITS)
        check_name(engine)
        arguments.check_bool("layer_norm", layer_norm)
        arguments.check_bool("batch_first", batch_first)
        if dtype is not None:
            arguments.check_dtype("dtype", dtype)
        self.feature_sizes, self.hidden_size = sizes, hidden_size
        self.unit, self.content, self.batch_first = unit, content, batch_first
        of_context: dict[str, object] = {"summarizer": summarizer, "mix": mix}
        if unit != "mcu":
            of_mcu = {"content": content, "layer_norm": layer_norm, "init": init, "engine": engine}
            _warn_unused(f'unit="{unit}"', {**of_context, **of_mcu}, 'unit="mcu"')
            recurrent = nn.GRU if unit == "gru" else nn.LSTM
            self.units = nn.ModuleList(
                recurrent(size, hidden_size, batch_first=True, device=device, dtype=dtype)
                for size in sizes
            )
        else:
            if content == "cross" and len(sizes) == 1:
                raise ValueError(
                    'feature_sizes must name two modalities or more with content="cross", but '
                    'has 1: take content="self" or content="none"'
                )
            if content == "none":
                _warn_unused('content="none"', of_context, 'content="cross" or content="self"')
                contexts = [0] * len(sizes)
            else:
                self.summarizers = nn.ModuleList(
                    Summarizer(summarizer, size, device=device, dtype=dtype) for size in sizes
                )
                others = [sum(sizes) - size for size in sizes]
                contexts = others if content == "cross" else sizes
            self.units = nn.ModuleList(
                FusedMCU(
                    size,
                    context,
                    hidden_size,
                    layer_norm=layer_norm,
                    mix=mix,
                    init=init,
                    engine=engine,
                    device=device,
                    dtype=dtype,
                )
                for size, context in zip(sizes, contexts, strict=True)
            )
        joint_size = len(sizes) * hidden_size
        self.classifier = nn.Linear(joint_size, num_classes, device=device, dtype=dtype)

    def forward(self, features: Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, K]`, the argument of Eq. 5's softmax.

        Args:
            features: N tensors `[B, T, feature_sizes[i]]` (`[T, B, ...]` unless batch_first).
            lengths: integers `[B]` in 1..T; steps past a sample's length are not used.

        Raises:
            ValueError: a wrong number of modalities, shape, device or length.
            TypeError: a wrong dtype.
        """
        return self.classifier(torch.cat(self.streams(features, lengths), dim=-1))

    def streams(self, features: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """Each modality's h_T: N tensors `[B, hidden_size]`; arguments as in `forward`."""
        self._check(features, lengths)
        features = list(features) if self.batch_first else [f.transpose(0, 1) for f in features]
        if self.unit != "mcu":
            return [
                _last_state(unit, f, lengths) for unit, f in zip(self.units, features, strict=True)
            ]
        contents = self._contents(features, lengths)
        units = list(self.units)  # Eq. 4
        if not _are_one_call(units):
            return [
                self._state(i, f, () if contents is None else (contents[i],), lengths)
                for i, f in enumerate(features)
            ]
        mcus = cast(list[FusedMCU], units)
        _, h_n = functional.mcu_group(
            features,
            contents,
            [mcu.weights() for mcu in mcus],
            lengths=lengths,
            mix=mcus[0].mix,
            batch_first=True,
            eps=mcus[0].eps,
            engine=mcus[0].engine,
            recompute=mcus[0].recompute,
        )
        return list(h_n.unbind(0))

    def _contents(self, features: Sequence[Tensor], lengths: Tensor | None) -> list[Tensor] | None:
        """Each unit's content of `[B, T, d_f]` (Eq. 2-3); None for units without context."""
        if self.content == "none":
            return None
        contents = [
            summarizer(f, lengths) for summarizer, f in zip(self.summarizers, features, strict=True)
        ]
        if self.content == "self":
            return contents
        return [torch.cat(contents[:i] + contents[i + 1 :], dim=-1) for i in range(len(contents))]

    def _state(
        self, i: int, features: Tensor, content: Sequence[Tensor], lengths: Tensor | None
    ) -> Tensor:
        """`[B, H]`, the last state of units[i] on `[B, T, d_f]` and its content, if it gets one."""
        unit = self.units[i]
        batch_first = getattr(unit, "batch_first", False)
        result = unit(
            features if batch_first else features.transpose(0, 1), *content, lengths=lengths
        )
        h_n = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        expected = [1, len(features), self.hidden_size]
        if not isinstance(h_n, Tensor) or list(h_n.shape) != expected:
            given = f"a {type(result).__name__}"
            if isinstance(h_n, Tensor):
                given = f"h_n of shape {list(h_n.shape)}"
            raise ValueError(
                f"units[{i}] must return (output, h_n) with h_n [1, B, hidden_size] = {expected}, "
                f"but returned {given}"
            )
        return h_n.squeeze(0)

    def _check(self, features: Sequence[Tensor], lengths: Tensor | None) -> None:
        _check_count("features", features, len(self.feature_sizes))
        for i, (feature, size) in enumerate(zip(features, self.feature_sizes, strict=True)):
            arguments.check_tensor(f"features[{i}]", feature)
            order = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
            if feature.ndim != 3 or feature.shape[-1] != size:
                raise ValueError(
                    f"features[{i}] must be {order.format(size)}, "
                    f"but has shape {list(feature.shape)}"
                )
            if feature.shape[:2] != features[0].shape[:2]:
                raise ValueError(
                    "features must agree in B and T, but features[0] has shape "
                    f"{list(features[0].shape)} and features[{i}] {list(feature.shape)}"
                )
            if feature.shape[1 if self.batch_first else 0] == 0:
                raise ValueError(
                    f"features[{i}] must have at least one step, but has shape "
                    f"{list(feature.shape)}"
                )
            arguments.check_alike("features", i, feature, features[0])
        arguments.check_dtype("features[0]", features[0].dtype)
        if type(self.units[0]) in (FusedMCU, nn.GRU, nn.LSTM):  # any other checks for itself
            weight = next(self.units[0].parameters())
            arguments.check_like_weight("features[0]", features[0], weight)
        if lengths is not None:
            batch, steps = features[0].shape[:2]
            if not self.batch_first:
                batch, steps = steps, batch
            arguments.check_lengths(lengths, steps, batch, features[0])


class StreamClassifiers(nn.Module):
    """One classifier per modality on a frozen network's h_T (Eq. 15), for Table 4.

    Args:
        network: its weights are not trained here and get no gradient (Section 4.3.4).

    Raises:
        TypeError: network is not an MMixer.
    """

    def __init__(self, network: MMixer) -> None:
        super().__init__()
        if not isinstance(network, MMixer):
            raise TypeError(f"network must be an MMixer, but is a {type(network).__name__}")
        classes = network.classifier.out_features
        self.weights = nn.ModuleList(
            nn.Linear(network.hidden_size, classes, bias=False) for _ in network.feature_sizes
        )

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Logits `[B, K]` of each modality from `MMixer.streams`; the network gets no gradient.

        Raises:
            ValueError: a wrong number of streams, a wrong shape or device.
            TypeError: what is no tensor, or has another dtype than the classifiers.
        """
        _check_count("streams", streams, len(self.weights))
        weights = [cast(nn.Linear, linear).weight for linear in self.weights]
        for i, (stream, weight) in enumerate(zip(streams, weights, strict=True)):
            arguments.check_tensor(f"streams[{i}]", stream)
            expected = [len(streams[0]), weight.shape[1]]
            if list(stream.shape) != expected:
                raise ValueError(
                    f"streams[{i}] must be [B, hidden_size] = {expected}, "
                    f"but has shape {list(stream.shape)}"
                )
            arguments.check_like_weight(f"streams[{i}]", stream, weight)
        return [
            weight(stream.detach()) for weight, stream in zip(self.weights, streams, strict=True)
        ]


def _warn_unused(chosen: str, options: dict[str, object], instead: str) -> None:
    """A UserWarning for each option that is not at its default, which `chosen` has no use for."""
    for name, value in options.items():
        if value != _OF_MCU[name]:
            warnings.warn(
                f"{chosen} does not use {name}={value!r}: leave it out, or take {instead}",
                stacklevel=3,
            )


def _are_one_call(units: Sequence[nn.Module]) -> bool:
    """Whether one call of the engine does all that calling each unit would: nothing looks on, and
    all have the same options."""
    try:
        if module_hooks._has_any_global_hook() or FusedMCU.forward is not _FORWARD:
            return False
        for unit in units:
            # Parametrisations and FSDP change the type; wrappers have another.
            if type(unit) is not FusedMCU or "forward" in unit.__dict__:
                return False
            if unit._compiled_call_impl is not None:
                return False
            if unit._forward_hooks or unit._forward_pre_hooks:
                return False
            if unit._backward_hooks or unit._backward_pre_hooks:
                return False
    except AttributeError:
        return False  # a PyTorch that keeps its hooks elsewhere
    return len({_options(cast(FusedMCU, unit)) for unit in units}) == 1


def _options(unit: FusedMCU) -> tuple[object, ...]:
    layer_norm = unit.norm_weight is not None
    return unit.hidden_size, layer_norm, unit.mix, unit.eps, unit.engine, unit.recompute


def _last_state(unit: nn.Module, features: Tensor, lengths: Tensor | None) -> Tensor:
    """`[B, H]`, the last valid state of an `nn.GRU` or `nn.LSTM` over `[B, T, D]`."""
    sequence: Tensor | PackedSequence = features
    if not getattr(unit, "batch_first", True):
        sequence = features.transpose(0, 1)
    if lengths is not None and len(lengths):  # without samples there is nothing to pack
        sequence = pack_padded_sequence(features, lengths.cpu(), True, enforce_sorted=False)
    state = unit(sequence)[1]
    return (state[0] if isinstance(state, tuple) else state).squeeze(0)  # nn.LSTM has two


def _check_count(name: str, tensors: Sequence[Tensor], count: int) -> None:
    arguments.check_sequence(name, tensors, "a sequence of Tensors")
    if len(tensors) != count:
        raise ValueError(
            f"{name} must have {count} tensors, one per modality, but has {len(tensors)}"
        )
