"""The calls that are timed, at sizes `[T, B, H]` with input_size = context_size = hidden_size, and
the check that a kernel has to pass before a number of it is reported."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmixer_kernels import (
    CellStream,
    FusedMCU,
    FusedMCUCell,
    FusedMCUStack,
    PrepackedMCU,
    functional,
    reference,
)
from mmixer_kernels.comparison.checking import (
    TOLERANCE,
    Subject,
    check,
    largest,
    relative_error,
    unit_subject,
)
from mmixer_kernels.comparison.passes import contender
from mmixer_kernels.comparison.timing import Contender
from mmixer_kernels.reference import Weights


class Size(NamedTuple):
    steps: int
    batch: int
    hidden: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Layers(nn.ModuleList):
    """Recurrent layers beside each other: the output of each for its own input."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(input)[0] for layer, input in zip(self, inputs, strict=True)]


def sequence_operands(
    size: Size,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    context_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """input `[T, B, H]` and context `[B, context_size]`, by default `[B, H]`."""
    shape = size.batch, context_size or size.hidden
    context = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    return torch.randn(size, device=device, dtype=dtype, requires_grad=True), context


def sequence_contenders(
    size: Size,
    passes: str,
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Contender]:
    """FusedMCU, then eager reference, nn.GRU and nn.LSTM, the same in every call."""
    torch.manual_seed(0)
    sizes = [size.hidden] * 3
    unit = FusedMCU(*sizes, engine=engine, device=device, dtype=dtype)
    operands = sequence_operands(size, device, dtype)
    eager = reference.MCU(*sizes, device=device, dtype=dtype)
    eager.load_state_dict(unit.state_dict())
    gru = nn.GRU(*sizes[:2], device=device, dtype=dtype)
    lstm = nn.LSTM(*sizes[:2], device=device, dtype=dtype)
    return [
        contender("FusedMCU", unit, operands, passes),
        contender("eager reference", eager, operands, passes),
        contender("nn.GRU", gru, operands[:1], passes),
        contender("nn.LSTM", lstm, operands[:1], passes),
    ]


@functools.cache
def check_sequence(
    size: Size,
    engine: str,
    device: torch.device,
    threads: int,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    path: str = "",
) -> float:
    """`check` of the FusedMCU of `sequence_contenders`, once for each number of threads, and for
    each name of a path that the caller makes the engine take."""
    torch.manual_seed(0)
    unit = FusedMCU(*[size.hidden] * 3, engine=engine, device=device, dtype=dtype)
    return check(unit_subject(unit, sequence_operands(size, device, dtype)), tolerance)


def check_prepacked(size: Size, device: torch.device, threads: int) -> float:
    """The largest error of `prepacked_contender` against float64; the engine's own is checked once
    for each number of threads."""
    check_sequence(size, "cpu", device, threads)
    prepacked, operands = _prepacked(size, device)
    unit, doubles = prepacked.unit, [x.double() for x in operands]
    weights = Weights(*(x.detach().double() for x in unit.weights()))
    found, expected = prepacked(*operands), reference.mcu(*doubles, weights)
    names = "output", "h_n"
    pairs = zip(names, found, (expected[0], expected[1].unsqueeze(0)), strict=True)
    return largest({name: relative_error(x, truth) for name, x, truth in pairs})


def prepacked_contender(size: Size, device: torch.device) -> Contender:
    """The PrepackedMCU of the FusedMCU of `sequence_contenders`, forward."""
    return contender("PrepackedMCU", *_prepacked(size, device), "forward")


def _prepacked(size: Size, device: torch.device) -> tuple[PrepackedMCU, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    unit = FusedMCU(*[size.hidden] * 3, engine="cpu", device=device)
    input, context = (x.detach() for x in sequence_operands(size, device))
    return PrepackedMCU(unit), (input, context)


class StackForm(NamedTuple):
    num_layers: int = 1
    bidirectional: bool = False


def stack_contenders(
    size: Size,
    form: StackForm,
    passes: str,
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Contender]:
    """FusedMCUStack without context, then nn.GRU of the same layers and directions, and FusedMCU
    without and with context."""
    torch.manual_seed(0)
    operands = sequence_operands(size, device, dtype)
    H, options, like = size.hidden, form._asdict(), {"device": device, "dtype": dtype}
    stack = FusedMCUStack(H, 0, H, **options, engine=engine, **like)
    gru = nn.GRU(H, H, **options, **like)
    unit = FusedMCU(H, 0, H, engine=engine, **like)
    with_context = FusedMCU(H, H, H, engine=engine, **like)
    return [
        contender("FusedMCUStack", stack, operands[:1], passes),
        contender("nn.GRU", gru, operands[:1], passes),
        contender("FusedMCU", unit, operands[:1], passes),
        contender("FusedMCU with context", with_context, operands, passes),
    ]


@functools.cache
def check_stack(
    size: Size,
    form: StackForm,
    engine: str,
    device: torch.device,
    threads: int,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> float:
    """`check` of the FusedMCUStack of `stack_contenders`, once for each number of threads."""
    torch.manual_seed(0)
    H, directions = size.hidden, 1 + form.bidirectional
    stack = FusedMCUStack(H, 0, H, **form._asdict(), engine=engine, device=device, dtype=dtype)

    def truth(input: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        sets = Weights.sets(weights, form.num_layers * directions, has_context=False)
        output = input
        states: list[Tensor] = []
        for i in range(0, len(sets), directions):
            results = [
                reference.mcu(output, None, weight_set, reverse=reverse)
                for weight_set, reverse in zip(
                    sets[i : i + directions], (False, True), strict=False
                )
            ]
            outputs, h_n = zip(*results, strict=True)
            output = torch.cat(outputs, -1)
            states += h_n
        return output, torch.stack(states)

    input, _ = sequence_operands(size, device, dtype)
    operands = {"input": input, **dict(stack.named_parameters())}
    return check(Subject(lambda input, *_: stack(input), truth, operands), tolerance)


@functools.cache
def check_cell(
    size: Size,
    engine: str,
    device: torch.device,
    threads: int,
    weight_dtype: torch.dtype = torch.float32,
) -> float:
    """`check` of the FusedMCUCell of `cell_contenders`, once for each number of threads."""
    cell, operands = _cell(size, engine, device, weight_dtype)

    def truth(input: Tensor, context: Tensor, hx: Tensor, *own: Tensor) -> tuple[Tensor]:
        return (reference.mcu(input.unsqueeze(0), context, Weights(*own or cell.weights()), hx)[1],)

    if weight_dtype == torch.float32:  # gradients in bfloat16 are not exact to the tolerance
        operands |= dict(cell.named_parameters())
    return check(Subject(lambda *own: (cell(*own[:3]),), truth, operands))


def cell_contenders(
    size: Size,
    passes: str,
    engine: str,
    device: torch.device,
    weight_dtype: torch.dtype = torch.float32,
) -> list[Contender]:
    """FusedMCUCell, its weights in weight_dtype, then eager reference, nn.GRUCell and nn.LSTMCell.
    Features and states are float32, as are the others' weights."""
    cell, operands = _cell(size, engine, device, weight_dtype)
    input, context, hx = operands.values()
    cx = torch.randn_like(hx, requires_grad=True)
    gru = nn.GRUCell(size.hidden, size.hidden, device=device)
    lstm = nn.LSTMCell(size.hidden, size.hidden, device=device)

    def eager(input: Tensor, context: Tensor, hx: Tensor, *_: Tensor) -> Tensor:
        return reference.mcu(input.unsqueeze(0), context, cell.weights(), hx)[1]

    def long_short(input: Tensor, hx: Tensor, cx: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return lstm(input, (hx, cx))

    return [
        contender("FusedMCUCell", cell, (input, context, hx), passes),
        contender("eager reference", eager, (input, context, hx, *cell.parameters()), passes),
        contender("nn.GRUCell", gru, (input, hx), passes),
        contender("nn.LSTMCell", long_short, (input, hx, cx, *lstm.parameters()), passes),
    ]


STREAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""The dtype of a cell, by the weights that its stream has: int8 are made of float32."""


@functools.cache
def check_stream(size: Size, device: torch.device, threads: int, weights: str) -> float:
    """The largest error of the CellStream of `stream_contenders` over some steps, once for each
    number of threads: against float64, and with int8 weights against the same integers in plain
    PyTorch."""
    cell, operands = _cell(size, "cpu", device, STREAMED[weights])
    input, context, hx = (x.detach() for x in operands.values())
    inputs = torch.stack([input, -input, 2 * input])
    if weights == "int8":
        stream = CellStream(cell.quantized(), context, hx)
        truth = copy.copy(stream.cell)
        truth.engine = "reference"
        expected = []
        for x in inputs:
            expected.append(hx := truth(x, context, hx))
    else:
        stream = CellStream(cell, context, hx)
        doubles = (x.detach().double() for x in (inputs, context, *cell.weights(), hx))
        sequence, of_all, *own, first = doubles
        expected = list(reference.mcu(sequence, of_all, Weights(*own), first)[0])
    states = [stream(x).clone() for x in inputs]
    errors = {
        f"state {i}": relative_error(*pair)
        for i, pair in enumerate(zip(states, expected, strict=True))
    }
    return largest(errors)


def stream_contenders(size: Size, device: torch.device, weights: str) -> list[Contender]:
    """CellStream, then its cell, nn.GRUCell and nn.LSTMCell."""
    dtype = STREAMED[weights]
    cell, operands = _cell(size, "cpu", device, dtype)
    input, context, hx = (x.detach() for x in operands.values())
    cells = cell_contenders(size, "forward", "cpu", device, dtype)
    others = [x for x in cells if x.name != "eager reference"]
    if weights == "int8":
        quantized = cell.quantized()
        stream = CellStream(quantized, context, hx)
        others[0] = contender("QuantizedMCUCell", quantized, (input, context, hx), "forward")
    else:
        stream = CellStream(cell, context, hx)
    return [contender("CellStream", stream, (input,), "forward"), *others]


def _cell(
    size: Size, engine: str, device: torch.device, weight_dtype: torch.dtype
) -> tuple[FusedMCUCell, dict[str, Tensor]]:
    """A cell, and a step's input, context and hx, the same in every call."""
    torch.manual_seed(0)
    cell = FusedMCUCell(*[size.hidden] * 3, engine=engine, device=device, dtype=weight_dtype)
    shape = size.batch, size.hidden
    names = "input", "context", "hx"
    return cell, {name: torch.randn(shape, device=device, requires_grad=True) for name in names}


class Group(NamedTuple):
    """N modalities: N inputs, contexts and weight sets of one size."""

    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[Weights]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], count: int) -> Group:
        weights = [
            Weights(*tensors[2 * count + i :: count][: len(Weights._fields)]) for i in range(count)
        ]
        return cls(list(tensors[:count]), list(tensors[count : 2 * count]), weights)

    @classmethod
    def random(
        cls,
        size: Size,
        count: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        context_size: int | None = None,
    ) -> Group:
        torch.manual_seed(0)
        operands = [sequence_operands(size, device, dtype, context_size) for _ in range(count)]
        sizes = size.hidden, context_size or size.hidden, size.hidden
        units = [reference.MCU(*sizes, device=device, dtype=dtype) for _ in range(count)]
        inputs, contexts = map(list, zip(*operands, strict=True))
        return cls(inputs, contexts, [unit.weights() for unit in units])

    def operands(self) -> dict[str, Tensor]:
        named = {f"inputs[{i}]": x for i, x in enumerate(self.inputs)}
        named |= {f"contexts[{i}]": x for i, x in enumerate(self.contexts)}
        for name in Weights._fields:
            for i, weights in enumerate(self.weights):
                named[f"weights[{i}].{name}"] = getattr(weights, name)
        return named


@functools.cache
def check_group(
    size: Size,
    count: int,
    engine: str,
    device: torch.device,
    threads: int,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    context_size: int | None = None,
) -> float:
    """`check` of the grouped call on `Group.random`, once for each number of threads."""
    group = Group.random(size, count, device, dtype, context_size)

    def truth(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        singles = [reference.mcu(*single) for single in zip(*Group.of(tensors, count), strict=True)]
        output, h_n = (torch.stack(part) for part in zip(*singles, strict=True))
        return output, h_n

    return check(
        Subject(lambda *_: functional.mcu_group(*group, engine=engine), truth, group.operands()),
        tolerance,
    )
