"""The checks of what callers hand over, and `nn.GRU`'s layouts, brought to `[T, B, ...]` and back.

Every message names the argument, what it is and what it must be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import autocast
from .problem import Layout as CallLayout
from .problem import Problem, Step, Weights, gates

_is_wrapped = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda tensor: False
)
"""Whether a transform of torch.func has the values; a private function of torch's."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXES = ("gated", "concat")
_LARGEST_OFFSET = 2**40  # bytes of a view into its storage; addresses below are looked at closely


class Layout(NamedTuple):
    """How the caller lays out a sequence: how to bring it to `[T, B, ...]`, and results back."""

    batch_first: bool
    batched: bool
    packed: PackedSequence | None

    @classmethod
    def of(cls, input: Tensor | PackedSequence, batch_first: bool) -> Layout:
        """The layout of an input, whose type and dimensions are checked."""
        check_bool("batch_first", batch_first)
        if isinstance(input, PackedSequence):
            if torch.compiler.is_exporting():
                raise ValueError(
                    "input must be a Tensor where torch.export traces, which cannot follow the "
                    "steps of a PackedSequence: give the padded tensor and lengths"
                )
            _check_packed(input)
            return cls(batch_first=False, batched=True, packed=input)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"input must be a Tensor or a PackedSequence, but is a {type(input).__name__}"
            )
        check_tensor("input", input)
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
        context: Tensor | None,
        hx: Tensor | None,
        lengths: Tensor | None,
        states: int = 1,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Input `[T, B, input_size]`, context `[B, context_size]`, hx `[states, B, H]` and lengths
        of the caller's; views, except for a PackedSequence."""
        dims = 2 if self.batched else 1
        if context is not None:
            check_tensor("context", context)
            expected = "[B, context_size]" if self.batched else "[context_size] for unbatched input"
            if context.ndim != dims:
                raise ValueError(f"context must be {expected}, but has shape {list(context.shape)}")
        if hx is not None:
            self.check_states(hx, states)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None when input is a PackedSequence")
            if input.sorted_indices is not None:
                sequences = input.sorted_indices.numel()
                for name, rows in (("context", context), ("hx", hx)):
                    if rows is not None and rows.shape[-2] != sequences:
                        raise ValueError(
                            f"{name} must have one row per sequence of the PackedSequence, "
                            f"{sequences}, but has {rows.shape[-2]}"
                        )
                if context is not None:
                    context = context.index_select(0, input.sorted_indices)
                if hx is not None:
                    hx = hx.index_select(1, input.sorted_indices)
            in_order = PackedSequence(input.data, input.batch_sizes)
            padded, lengths = _eagerly(pad_packed_sequence, in_order)
            return padded, context, hx, lengths.to(padded.device)
        if not self.batched:
            if lengths is not None:
                raise ValueError("lengths must be None when input is unbatched: shorten the input")
            hx = None if hx is None else hx.unsqueeze(1)
            context = None if context is None else context.unsqueeze(0)
            return input.unsqueeze(1), context, hx, None
        return input.transpose(0, 1) if self.batch_first else input, context, hx, lengths

    def check_states(self, hx: Tensor, states: int) -> None:
        """ValueError unless hx is `[states, B, H]`, or `[states, H]` unbatched; TypeError where it
        is no tensor."""
        check_tensor("hx", hx)
        if hx.ndim != (3 if self.batched else 2) or hx.shape[0] != states:
            expected = f"[{states}, B, H]" if self.batched else f"[{states}, H] for unbatched input"
            hint = ""
            if hx.ndim == 2:
                hint = "; a unit of context_size 0 takes hx as its second argument, and no context"
            raise ValueError(f"hx must be {expected}, but has shape {list(hx.shape)}{hint}")

    def restore(self, output: Tensor, h_n: Tensor) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output `[T, B, D]` and h_n `[states, B, H]` in the caller's layout."""
        if self.packed is not None:
            sizes = self.packed.batch_sizes  # on the CPU, wherever the data lie
            samples = torch.arange(h_n.shape[1], device=sizes.device)
            lengths = (sizes[:, None] > samples).sum(0)
            data = _eagerly(pack_padded_sequence, output, lengths).data
            result = PackedSequence(data, *self.packed[1:])
            if self.packed.unsorted_indices is not None:
                h_n = h_n.index_select(1, self.packed.unsorted_indices)
            return result, h_n
        if not self.batched:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), h_n


def _eagerly(function: Callable[..., Any], *operands: object) -> Any:
    """Outside of what torch.compile traces: it knows no packing, whose sizes are values."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*operands)


def _check_packed(input: PackedSequence) -> None:
    """Raises unless it is what `pack_padded_sequence` makes of `[T, B, input_size]`."""
    data = check_tensor("input.data", input.data)
    if data.ndim != 2:
        raise ValueError(
            "input must pack sequences of [T, B, input_size], but its data has shape "
            f"{list(data.shape)}"
        )
    if torch.compiler.is_compiling():
        return  # which must not look at values
    sizes = input.batch_sizes.tolist()
    if not sizes or min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"input's batch_sizes must be positive and never grow, but are {sizes}")
    if sum(sizes) != len(data):
        raise ValueError(
            f"input's batch_sizes must add up to the rows of its data, {len(data)}, "
            f"but give {sum(sizes)}"
        )


def check_tensor(name: str, value: object) -> Tensor:
    """The value itself; TypeError where it is no tensor, or a sparse or jagged one."""
    if not isinstance(value, Tensor):
        leaf = ": let torch.fx's tracer take the module as a leaf"
        hint = leaf if isinstance(value, torch.fx.Proxy) else ""
        raise TypeError(f"{name} must be a Tensor, but is a {type(value).__name__}{hint}")
    if value.layout is not torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense Tensor, but is {kind}: use .to_dense() or pad it")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense Tensor, but is nested: pad it")
    return value


def context_and_hx(context: Tensor | None, hx: Tensor | None) -> tuple[None, Tensor | None]:
    """Context and first state of a call of a module without context, which may have the first state
    in the context's place: `unit(input, h_0)`, as of `nn.GRU`."""
    if context is not None and hx is not None:
        hint = ""
        if isinstance(context, torch.fx.Proxy):  # A tracer gives every argument.
            hint = ", for torch.fx's tracer by concrete_args={'context': None}"
        raise ValueError(
            "context must be None, since this unit has none (context_size=0), but hx is given "
            f"beside it: leave it out{hint}"
        )
    return None, hx if context is None else context


def check_sequence(name: str, value: object, kind: str = "a sequence") -> None:
    """A stacked Tensor is one too."""
    if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.ndim):
        raise TypeError(f"{name} must be {kind}, but is a {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {value!r}")


def check_alike(names: str, i: int, tensor: Tensor, first: Tensor) -> None:
    """Raises unless two tensors of a call agree in dtype and device.

    Args:
        tensor: the operand names[i].
        first: the operand names[0].
    """
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"{names} must agree in dtype, but {names}[0] is {first.dtype} and {names}[{i}] "
            f"{tensor.dtype}: convert one of them with .to()"
        )
    if tensor.device != first.device:
        raise ValueError(
            f"{names} must be on one device, but {names}[0] is on {first.device} and {names}[{i}] "
            f"on {tensor.device}: move one of them with .to()"
        )


def check_like_weight(name: str, tensor: Tensor, weight: Tensor) -> None:
    """A module's input has the device and the dtype of its weights, which may be bfloat16 beside
    float32. Inside autocast float32 and autocast's dtype go with either, float64 with itself."""
    if autocast.is_on(tensor.device.type) and weight.dtype is not torch.float64:
        narrow = torch.get_autocast_dtype(tensor.device.type)
        if tensor.dtype not in (torch.float32, narrow):
            raise TypeError(
                f"{name} must be {torch.float32} or {narrow} inside autocast, but is "
                f"{tensor.dtype}: convert it with .float()"
            )
    elif tensor.dtype not in (
        weight.dtype,
        torch.float32 if weight.dtype is torch.bfloat16 else weight.dtype,
    ):
        raise TypeError(
            f"{name} must have the weights' dtype, {_name(weight.dtype)}, but is "
            f"{_name(tensor.dtype)}: convert one of them with .to()"
        )
    if tensor.device != weight.device:
        raise ValueError(
            f"{name} must be on the weights' device, {weight.device}, but is on {tensor.device}: "
            "move one of them with .to()"
        )


def check_sizes(sizes: dict[str, int]) -> None:
    """ValueError unless each size, under its name, is a positive int; `context_size` may be 0."""
    for name, size in sizes.items():
        least, must = (0, "an int from 0 on") if name == "context_size" else (1, "a positive int")
        if type(size) is bool or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} must be {must}, but is {size!r}")


def check_bool(name: str, value: object) -> None:
    """TypeError unless the value is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def check_options(mix: str, eps: float) -> None:
    """ValueError unless both are options of a call."""
    check_choice("mix", mix, MIXES)
    is_number = type(eps) is float or (isinstance(eps, int | float) and type(eps) is not bool)
    if not is_number or not 0 < eps <= sys.float_info.max:
        raise ValueError(f"eps must be a positive finite float, but is {eps!r}")


def check_dtype(name: str, dtype: object) -> None:
    """TypeError unless the engines compute with tensors of this dtype."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, but is {_name(dtype)}"
        )


def check(problem: Problem, layout: CallLayout = "sequence") -> None:
    """Options, shapes, dtypes and devices of a call, and that its weight sets agree.

    Args:
        layout: that of the call, by which the messages name an operand.

    Raises:
        ValueError: a wrong shape, device, length, mix or eps.
        TypeError: a wrong dtype, or a weight that is no tensor.
    """
    inputs, _, sets, hx, lengths, mix, eps, _ = problem
    check_options(mix, eps)
    if hx is not None:
        check_tensor("hx", hx)
        if hx.ndim != 3 or hx.shape[0] != len(inputs):
            shape = list(hx.shape)
            raise ValueError(f"hx must be [G, B, H] with G = {len(inputs)}, but has shape {shape}")
    operands = zip(inputs, problem.each_context, sets, strict=True)
    for i, (input, context, weights) in enumerate(operands):
        if i > 0:
            check_alike("inputs", i, input, inputs[0])
            _check_agreement(problem, i)
        named = partial(name_of, i, layout)
        if input.dtype not in DTYPES:
            check_dtype(named("input"), input.dtype)
        if input.shape[0] == 0:
            raise ValueError(f"{named('input')} must have at least one step, but has none")
        _check_set(input, context, weights, None if hx is None else hx[i], named)
    if lengths is not None:
        steps, batch, _ = inputs[0].shape
        check_lengths(lengths, steps, batch, inputs[0])


def check_step(step: Step) -> None:
    """`check` of a single step."""
    check_options(step.mix, step.eps)
    check_dtype("input", step.input.dtype)
    _check_set(step.input, step.context, step.weights, step.hx, partial(name_of, 0, "step"))


def _check_agreement(problem: Problem, i: int) -> None:
    """The i-th of a call's groups has the first one's T, B and H, and norms where it has them."""
    input, first_input = problem.inputs[i], problem.inputs[0]
    if input.shape[:2] != first_input.shape[:2]:
        sizes = [f"T = {x.shape[0]} and B = {x.shape[1]}" for x in (first_input, input)]
        raise ValueError(
            f"inputs must agree in T and B, but inputs[0] has {sizes[0]}, inputs[{i}] {sizes[1]}"
        )
    weights, first = problem.weights[i], problem.weights[0]
    weight = check_tensor(f"weights[{i}].weight_r", weights.weight_r)
    if weight.shape != first.weight_r.shape:
        raise ValueError(
            f"weights must agree in H, but weights[0].weight_r is {list(first.weight_r.shape)} and "
            f"weights[{i}].weight_r {list(weight.shape)}"
        )
    for name, other in (("weight_g", "weight_s"), ("norm_weight", "norm_bias")):
        if (getattr(weights, name) is None) != (getattr(first, name) is None):
            raise ValueError(f"weights must all have {name} and {other}, or none of them")


def _check_set(
    input: Tensor,
    context: Tensor | None,
    weights: Weights,
    hx: Tensor | None,
    named: Callable[[str], str],
) -> None:
    """One weight set and its operands: input `[..., B, input_size]`, hx `[B, H]`."""
    batch, input_size = input.shape[-2:]
    for pair in (("weight_g", "weight_s"), ("norm_weight", "norm_bias")):
        if len({getattr(weights, name) is None for name in pair}) > 1:
            raise ValueError(
                f"{' and '.join(map(named, pair))} must both be given, or both be None"
            )
    if weights.has_context and context is None:
        raise TypeError(
            f"{named('context')} must be a Tensor, but is a NoneType: give one, [B, context_size], "
            "or make the unit with context_size=0"
        )
    if context is not None and not weights.has_context:
        raise ValueError(
            f"{named('context')} must be None beside weights without weight_g and weight_s, but "
            f"has shape {list(context.shape)}: leave it out, or make the unit with its size"
        )
    f, g, r = weights.weight_f, weights.weight_g, weights.weight_r
    shaping: dict[str, object] = {"weight_f": f, "weight_g": g, "weight_r": r}
    if g is None:
        del shaping["weight_g"]
    for matrix in shaping.values():
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.numel():
            _refuse_matrices(shaping, named)
    hidden, inputs, contexts = r.shape[0], f.shape[1], 0 if g is None else g.shape[1]
    dtype, device = input.dtype, input.device
    square, norm = (hidden, hidden), (len(gates(g is not None)), hidden)
    _check_tensors(
        (
            ("weight_f", f, (hidden, inputs)),
            ("weight_g", g, (hidden, contexts)),
            ("weight_s", weights.weight_s, (hidden, 2 * hidden)),
            ("weight_r", r, square),
            ("weight_z", weights.weight_z, square),
            ("weight_h", weights.weight_h, square),
            ("norm_weight", weights.norm_weight, norm),
            ("norm_bias", weights.norm_bias, norm),
        ),
        # Beside float32 features also bfloat16: half the memory to read at each step.
        (dtype, torch.bfloat16) if dtype is torch.float32 else (dtype,),
        device,
        named,
    )
    if input_size != inputs:
        raise ValueError(
            f"{named('input')} must have {inputs} features (input_size), but has {input_size}"
        )
    _check_tensors(
        (("context", context, (batch, contexts)), ("hx", hx, (batch, hidden))),
        (dtype,),
        device,
        named,
    )


def check_lengths(lengths: Tensor, steps: int, batch: int, input: Tensor) -> None:
    """lengths: integers `[B]` on input's device, in 1..T.

    The values are looked at only on a CPU outside torch.compile and transforms: elsewhere that
    would stop the device, break the graph or be refused.
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
    if lengths.device.type != "cpu" or batch == 0 or not can_look_at(lengths):
        return
    if int(lengths.min()) < 1 or int(lengths.max()) > steps:
        raise ValueError(
            f"lengths must be in 1..{steps} (T), but has values from {int(lengths.min())} "
            f"to {int(lengths.max())}"
        )


def can_look_at(tensor: Tensor) -> bool:
    """Whether the tensor has values to look at: it has not in torch.compile and transforms."""
    return not (tensor.is_meta or torch.compiler.is_compiling() or _is_wrapped(tensor))


def check_memory(call: Problem | Step, tensors: Sequence[Tensor]) -> None:
    """ValueError where the storage of one of a call's tensors was freed: a kernel would not survive
    it. TypeError where one is sparse, and has none.

    Args:
        tensors: the call's, `call.tensors()`.
    """
    with suppress(RuntimeError):  # of a tensor without storage
        # The address of a view of a freed storage is the view's offset in bytes.
        if min(map(Tensor.data_ptr, tensors)) > _LARGEST_OFFSET:
            return
    named = list(_named(call))
    for name, tensor in named:
        check_tensor(name, tensor)
    for name, tensor in named:
        if tensor.numel() and not tensor.is_meta and not tensor.untyped_storage().data_ptr():
            raise ValueError(
                f"{name} must have its values in memory, but its storage was freed, as sharding "
                "does with weights between calls: bring them back before the call"
            )


def _named(call: Problem | Step) -> Iterator[tuple[str, Tensor]]:
    """A call's tensors under the names that the caller knows them by."""
    if isinstance(call, Step):  # `Step.problem` makes views, which a freed storage refuses.
        contexts = [] if call.context is None else [call.context]
        call = Problem([call.input], contexts, [call.weights], call.hx)
    layout: CallLayout = "sequence"
    if len(call.inputs) > 1:
        layout = "concatenated" if call.bidirectional else "group"
    groups = zip(call.inputs, call.each_context, call.weights, strict=True)
    for i, (input, context, weights) in enumerate(groups):
        operands = {"input": input, "context": context, **weights._asdict()}
        operands |= {"hx": call.hx, "lengths": call.lengths}
        for name, tensor in operands.items():
            if tensor is not None:
                yield name_of(i, layout, name), tensor


def _refuse_matrices(matrices: dict[str, object], named: Callable[[str], str]) -> NoReturn:
    """Raises for the first wrong one of the matrices whose shapes say what the others must have."""
    for name, matrix in matrices.items():
        weight = check_tensor(named(name), matrix)
        if weight.ndim != 2 or 0 in weight.shape:
            break
    raise ValueError(f"{named(name)} must be {_MEANINGS[name]}, but has shape {list(weight.shape)}")


def _check_tensors(
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    named: Callable[[str], str],
) -> None:
    """Each tensor that there is has its shape, one of the dtypes, input's first, and the device."""
    for name, tensor, shape in expected:
        if tensor is None:
            if name in _OPTIONAL:
                continue
            tensor = check_tensor(named(name), tensor)
        if getattr(tensor, "shape", None) != shape:
            tensor = check_tensor(named(name), tensor)
            meaning = _MEANINGS[name] if name in ("context", "hx") else "H is weight_r's"
            raise ValueError(
                f"{named(name)} must have shape {list(shape)} ({meaning}), "
                f"but has {list(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:  # NumPy's are not
            check_tensor(named(name), tensor)
            raise TypeError(
                f"{named(name)} must have input's dtype, "
                f"{', or '.join(map(_name, dtypes))}, but is {_name(tensor.dtype)}: "
                f"convert one of them with .to()"
            )
        if tensor.device != device:
            raise ValueError(
                f"{named(name)} must be on input's device, {device}, "
                f"but is on {tensor.device}: move one of them with .to()"
            )


def name_of(group: int, layout: CallLayout, name: str) -> str:
    """The name that the caller knows an operand by: `mcu_group` numbers those of its groups, and
    the weight sets of one input have numbers alone."""
    if layout in ("sequence", "step") or name in ("hx", "lengths"):
        return name
    if name in ("input", "context"):
        return f"{name}s[{group}]" if layout == "group" else name
    return f"weights[{group}].{name}"


_OPTIONAL = ("weight_g", "weight_s", "context", "hx", "norm_weight", "norm_bias")
_MEANINGS = {
    "weight_f": "[H, input_size]",
    "weight_g": "[H, context_size]",
    "weight_r": "[H, H]",
    "context": "[B, context_size]",
    "hx": "[B, H] for this input and hidden_size",
}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
