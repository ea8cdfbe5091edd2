"""A call of the unit as one value, which every floor from the functions to the engines hands on.

`csrc/problem.h` describes the same for the native engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

GATES = ("f", "g", "s", "r", "z", "h")
"""The rows of `norm_weight` and `norm_bias`."""
_OF_CONTEXT = ("g", "s")

Keep = Literal["nothing", "states", "gates"]
"""The part of a forward that is kept for its backward: nothing; the states alone, from which
backward computes the rest again; or, with "gates", what else the engine likes to keep."""


Layout = Literal["group", "sequence", "step", "concatenated"]
"""The shape of a native call's output: `[G, T, B, H]`; of one weight set `[T, B, H]`; of a single
step, whose input and hx have no more dimensions either, `[B, H]`; or of all sets, one beside
another as features, `[T, B, G H]`."""


def gates(has_context: bool) -> tuple[str, ...]:
    """The rows of `norm_weight` and `norm_bias`: without context Eq. 8-10 fall away, and f_tilde is
    f_bar."""
    return GATES if has_context else tuple(gate for gate in GATES if gate not in _OF_CONTEXT)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other: statistics and state are never narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Weights(NamedTuple):
    """One weight set of an MCU, in the order in which the engines take it.

    Shapes: `weight_f [H, input_size]`, `weight_g [H, context_size]`, `weight_s [H, 2H]` (first H
    columns for f, last H for g), `weight_r`, `weight_z`, `weight_h [H, H]`; with layer norm
    `norm_weight`, `norm_bias [6, H]`, rows in the order f g s r z h. Without context `weight_g` and
    `weight_s` are None, and the norms `[4, H]`, rows f r z h.
    """

    weight_f: Tensor
    weight_g: Tensor | None
    weight_s: Tensor | None
    weight_r: Tensor
    weight_z: Tensor
    weight_h: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    @staticmethod
    def flat(sets: Iterable[Weights]) -> list[Tensor]:
        """The tensors of some sets, one set after another."""
        return [tensor for group in sets for tensor in group if tensor is not None]

    @classmethod
    def sets(cls, tensors: Sequence[Tensor], count: int, has_context: bool) -> list[Weights]:
        """The sets, `count` of them, that `flat` made these tensors of."""
        size = len(tensors) // count
        sets = (tensors[i : i + size] for i in range(0, len(tensors), size))
        if has_context:
            return [cls(*group) for group in sets]
        return [cls(group[0], None, None, *group[1:]) for group in sets]

    @property
    def has_context(self) -> bool:
        """Whether the set has matrices for a context."""
        return self.weight_g is not None

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight_r.shape[0]

    def map(self, function: Callable[[Any], Any]) -> Weights:
        """The set with `function` applied to each tensor that there is."""
        return Weights._make(None if x is None else function(x) for x in self)

    def to_dtypes_of(self, other: Weights) -> Weights:
        """The set in the dtypes of another."""
        pairs = zip(self, other, strict=True)
        return Weights._make(None if x is None or y is None else x.to(y.dtype) for x, y in pairs)

    def matrices(self) -> list[Tensor]:
        """The weights that there are, in the order f g s r z h."""
        return [tensor for tensor in self[:6] if tensor is not None]

    def norms(self) -> tuple[Tensor, ...]:
        """norm_weight and norm_bias, or nothing."""
        return () if self.norm_weight is None else self[6:]  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """The weights, then the two norm tensors where there are any."""
        return [tensor for tensor in self if tensor is not None]


class Problem(NamedTuple):
    """G weight sets over their sequences, time first: what every engine computes.

    inputs: G tensors `[T, B, input_size]`, whose input sizes may differ.
    contexts: G tensors `[B, context_size]`; likewise. Empty where no weight set has a context.
    weights: G weight sets of one hidden size H, all with context or none.
    hx: `[G, B, H]`, None for zeros.
    lengths: integers `[B]`, None where all are T.
    mix: "gated" (Eq. 9-10) or "concat" (Table 3, experiment II).
    eps: LayerNorm's.
    bidirectional: the second half of the weight sets runs from each sample's last step to its
        first; their output stands at the steps of their inputs all the same.
    """

    inputs: Sequence[Tensor]
    contexts: Sequence[Tensor]
    weights: Sequence[Weights]
    hx: Tensor | None = None
    lengths: Tensor | None = None
    mix: str = "gated"
    eps: float = 1e-5
    bidirectional: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """G, T, B and H."""
        return len(self.inputs), *self.inputs[0].shape[:2], self.weights[0].hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The inputs' dtype, in which output, h_n and the gradients are."""
        return self.inputs[0].dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of statistics, gates and states."""
        return compute_dtype(self.inputs[0].dtype)

    @property
    def has_context(self) -> bool:
        """Whether the weight sets have a context each."""
        return bool(self.contexts)

    @property
    def each_context(self) -> Sequence[Tensor | None]:
        """The context of each weight set."""
        return self.contexts or [None] * len(self.inputs)

    @property
    def directions(self) -> Sequence[bool]:
        """Each weight set's answer to whether it runs in reverse."""
        groups = len(self.inputs)
        if self.bidirectional and groups % 2:
            raise ValueError(
                f"bidirectional must be of an even number of weight sets, but there are {groups}"
            )
        return [self.bidirectional and 2 * i >= groups for i in range(groups)]

    @property
    def states(self) -> Sequence[Tensor | None]:
        """The initial state `[B, H]` of each weight set."""
        return [None] * len(self.inputs) if self.hx is None else list(self.hx)

    def map(self, function: Callable[[Any], Any]) -> Problem:
        """The call with `function` applied to each tensor, in the order of `tensors`."""
        return Problem(
            [function(x) for x in self.inputs],
            [function(x) for x in self.contexts],
            [group.map(function) for group in self.weights],
            None if self.hx is None else function(self.hx),
            None if self.lengths is None else function(self.lengths),
            self.mix,
            self.eps,
            self.bidirectional,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors that there are."""
        tensors = [*self.inputs, *self.contexts, *Weights.flat(self.weights)]
        if self.hx is not None:
            tensors.append(self.hx)
        if self.lengths is not None:
            tensors.append(self.lengths)
        return tensors

    def flat(self) -> tuple[Any, ...]:
        """The fields as a dispatcher op takes them, with one list of all sets' tensors."""
        inputs, contexts, weights, *rest = self
        return list(inputs), list(contexts), Weights.flat(weights), *rest

    @classmethod
    def of_flat(
        cls, inputs: Sequence[Tensor], contexts: Sequence[Tensor], weights: Any, *rest: Any
    ) -> Problem:
        """The call that `flat` gave these fields of."""
        sets = Weights.sets(weights, len(inputs), has_context=bool(contexts))
        return cls(inputs, contexts, sets, *rest)


class Form(NamedTuple):
    """A flat call without its tensors, which are kept elsewhere."""

    groups: int
    weights: int  # tensors of all sets
    has_context: bool
    has_hx: bool
    has_lengths: bool
    mix: str
    eps: float
    bidirectional: bool = False

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Form:
        """The form of a call in the fields of `Problem.flat`."""
        inputs, contexts, weights, hx, lengths, *options = flat
        tensors = len(inputs), len(weights), bool(contexts), hx is not None, lengths is not None
        return cls(*tensors, *options)

    @property
    def contexts(self) -> int:
        """The number of contexts."""
        return self.groups if self.has_context else 0

    def fill(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The fields of `Problem.flat`, with the values in the tensors' place."""
        first = self.groups
        second = first + self.contexts
        third = second + self.weights
        hx = values[third] if self.has_hx else None
        lengths = values[third + self.has_hx] if self.has_lengths else None
        lists = values[:first], values[first:second], values[second:third]
        return *lists, hx, lengths, self.mix, self.eps, self.bidirectional

    def in_order(self, gradients: Sequence[Any]) -> tuple[Any, ...]:
        """The gradients of inputs, contexts and weights, lists that may be empty, and of hx, in the
        order of the tensors; None where there is none."""
        inputs, contexts, weights, hx = gradients
        return (
            *(inputs or [None] * self.groups),
            *(contexts or [None] * self.contexts),
            *(weights or [None] * self.weights),
            *[hx] * self.has_hx,
            *[None] * self.has_lengths,
        )


class Call(NamedTuple):
    """A call of a native engine without its tensors, which are those of `Problem.tensors`."""

    form: Form
    keep: Keep
    layout: Layout = "group"
    batch_first: bool = False
    """Inputs are `[B, T, input_size]`, and output has B and T in this order too."""


class Step(NamedTuple):
    """One step of one weight set: input `[B, input_size]`, context `[B, context_size]`, None
    without, and hx `[B, H]`, None for zeros; the options are those of `Problem`."""

    input: Tensor
    context: Tensor | None
    weights: Weights
    hx: Tensor | None = None
    mix: str = "gated"
    eps: float = 1e-5

    def map(self, function: Callable[[Any], Any]) -> Step:
        """The step with `function` applied to each tensor."""
        return Step(
            function(self.input),
            None if self.context is None else function(self.context),
            self.weights.map(function),
            None if self.hx is None else function(self.hx),
            self.mix,
            self.eps,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors that there are."""
        operands = self.input, self.context, *self.weights, self.hx
        return [tensor for tensor in operands if tensor is not None]

    def form(self) -> Form:
        """The form of `tensors`."""
        weights, has_context = len(self.weights.tensors()), self.context is not None
        return Form(1, weights, has_context, self.hx is not None, False, self.mix, self.eps)

    def problem(self) -> Problem:
        """The step as a sequence of one."""
        hx = None if self.hx is None else self.hx.unsqueeze(0)
        inputs = [self.input.unsqueeze(0)]
        contexts = [] if self.context is None else [self.context]
        return Problem(inputs, contexts, [self.weights], hx, None, self.mix, self.eps)


class Cotangents(NamedTuple):
    """The gradients of a call's results: output `[G, T, B, H]`, of one weight set also `[T, B, H]`,
    and h_n `[G, B, H]`; None for zeros."""

    output: Tensor | None
    h_n: Tensor | None

    def filled(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Both as tensors, `[G, T, B, H]` and `[G, B, H]`."""
        groups, steps, batch, hidden = problem.sizes
        shape = groups, steps, batch, hidden
        output, h_n = self
        if output is None:
            output = problem.inputs[0].new_zeros(hidden).expand(shape)
        if h_n is None:
            h_n = problem.inputs[0].new_zeros(hidden).expand(groups, batch, hidden)
        return output.view(shape) if output.dim() == 3 else output, h_n


class Need(NamedTuple):
    """Whether the gradients of the inputs and of the weights are wanted; those of contexts and hx
    always are, as they cost little."""

    input: bool
    weights: bool


class Gradients(NamedTuple):
    """The gradients of a call's operands, in their shapes and dtypes; inputs and weights are empty
    where they are not needed, contexts where the call has none, and hx `[G, B, H]` is there also
    where the call has none."""

    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[Weights]
    hx: Tensor

    def flat(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """The fields as a dispatcher op returns them."""
        return self.inputs, self.contexts, Weights.flat(self.weights), self.hx
