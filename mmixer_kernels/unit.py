"""The options, parameters and initial values of a unit, which all of its modules have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from . import arguments
from .problem import Weights, gates

INITS = ("uniform", "orthogonal")
_RECURRENT = ("weight_r", "weight_z", "weight_h")


class Unit(nn.Module):
    """A module of one or several weight sets.

    The options are those of `reference.MCU`. Each set's parameters are the fields of `Weights` with
    a suffix of the set's own; a field that the unit has no use for is None.

    Args:
        input_sizes: that of each weight set, under its suffix.
    """

    num_layers = 1
    """As in `nn.GRU`, whose users ask for it."""
    bidirectional = False
    bias = False
    init = "uniform"
    _defaults: ClassVar[dict[str, object]] = {
        "layer_norm": True,
        "mix": "gated",
        "batch_first": False,
        "eps": 1e-5,
        "init": "uniform",
    }
    """The options that `extra_repr` tells of where they have other values."""
    _names: tuple[str, ...] = Weights._fields

    def __init__(
        self,
        input_size: int,
        context_size: int,
        hidden_size: int,
        input_sizes: Mapping[str, int],
        *,
        layer_norm: bool,
        mix: str,
        batch_first: bool,
        eps: float,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        sizes = {
            "input_size": input_size,
            "context_size": context_size,
            "hidden_size": hidden_size,
        }
        arguments.check_sizes(sizes)
        arguments.check_options(mix, eps)
        arguments.check_choice("init", init, INITS)
        arguments.check_bool("layer_norm", layer_norm)
        arguments.check_bool("batch_first", batch_first)
        if dtype is not None:
            arguments.check_dtype("dtype", dtype)
        self.input_size, self.context_size, self.hidden_size = sizes.values()
        self.layer_norm, self.mix, self.batch_first, self.eps = layer_norm, mix, batch_first, eps
        self.init = init
        for suffix, size in input_sizes.items():
            for name, shape in _shapes(size, context_size, hidden_size, layer_norm):
                parameter = None
                if shape is not None:
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
        self._names = tuple(self._parameters)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, uniform(-1/sqrt(H), 1/sqrt(H)), the recurrent ones orthogonal where
        `init` says so, and resets the norms to 1 and 0."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("norm_weight"):
                nn.init.ones_(parameter)
            elif name.startswith("norm_bias"):
                nn.init.zeros_(parameter)
            elif self.init == "orthogonal" and name.startswith(_RECURRENT):
                nn.init.orthogonal_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def _fields(self) -> Iterable[Tensor | None]:
        """The fields of the weight sets, one set after another."""
        # nn.Module's attribute access costs as much as a small step's products, eight times.
        parameters = self._parameters
        if tuple(parameters) == self._names:
            return parameters.values()
        return [getattr(self, name) for name in self._names]

    def flatten_parameters(self) -> None:
        """Does nothing: the engines take the parameters where they lie. `nn.GRU`, which lays its
        own out for cuDNN, has this method, so that programs call it on any recurrent layer."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Raises the TypeError that `torch.jit.script`, which asks for this, ends with."""
        raise TypeError(
            f"{type(self).__name__} cannot be scripted: use torch.jit.trace, torch.export or "
            "torch.compile"
        )

    def extra_repr(self) -> str:
        """The sizes, and the options that are not at their defaults."""
        text = f"{self.input_size}, {self.context_size}, {self.hidden_size}"
        for name, default in self._defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text


class SeenParameters:
    """A module's parameters, or buffers, as they are when something is made of them, to tell
    whether they are the same later.

    A change is known by their names, identities, addresses and versions. PyTorch counts no version
    for what is written by `.data`, by optimizers with `fused=True`, or by another owner of the
    memory, such as NumPy.
    """

    def __init__(self, fields: Mapping[str, Tensor | None]) -> None:
        own = [x for x in fields.values() if x is not None]
        self.are_counted = not any(x.is_inference() for x in own)
        """False where PyTorch counts no changes at all, of what was made in inference mode."""
        self.tensors = own if self.are_counted else []
        # While these are held, no other tensor's memory can have their address.
        self._memory = [x.detach() for x in self.tensors]
        self._state = self._look_at(fields)

    def are(self, fields: Mapping[str, Tensor | None]) -> bool:
        """Whether these are the same tensors, and unchanged where that is known."""
        return self._look_at(fields) == self._state

    def _look_at(self, fields: Mapping[str, Tensor | None]) -> tuple[Any, ...]:
        return (
            *fields,
            *map(id, fields.values()),
            *map(Tensor.data_ptr, self.tensors),
            *map(_version, self.tensors),
        )


_version = attrgetter("_version")


def _shapes(
    input_size: int, context_size: int, hidden_size: int, layer_norm: bool
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Each field of a weight set with its shape, None for what is not there."""
    has_context = context_size > 0
    square = hidden_size, hidden_size
    norm = (len(gates(has_context)), hidden_size) if layer_norm else None
    yield "weight_f", (hidden_size, input_size)
    yield "weight_g", (hidden_size, context_size) if has_context else None
    yield "weight_s", (hidden_size, 2 * hidden_size) if has_context else None
    yield "weight_r", square
    yield "weight_z", square
    yield "weight_h", square
    yield "norm_weight", norm
    yield "norm_bias", norm
