"""Other ways to make the same forward, which are measured beside it: what would be faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..command import processors
from ..modules import FusedMCU, FusedMCUCell
from ..prepacked import PrepackedMCU
from ..streaming import CellStream
from .case import Case
from .checking import TOLERANCE, exact, largest, relative_error, tolerance_of
from .machine import faster_engine, threads_are_set_by
from .timing import Ratio, torch_threads

STEPS = 16
"""Those of the sequence that stands beside calls of one step."""
WORTH = 0.95
"""An alternative is advice where the whole interval of its ratio is below this."""


class Alternative(NamedTuple):
    """A forward without gradients that may stand in the case's place.

    Args:
        advice: a sentence; `{}` is the part of the case's time that it takes.
        call: gives the output `[T, B, H]`.
        unit: the one whose equations it evaluates, and their operands.
        calls: the number of the case's calls that it is worth.
    """

    name: str
    advice: str
    call: Callable[[], Tensor]
    unit: FusedMCU
    operands: Sequence[Tensor]
    tolerance: float
    calls: int = 1

    def check(self) -> None:
        """WrongResult where the output is farther from float64 than it may be."""
        with torch.no_grad():
            expected, _ = exact(self.operands, list(self.unit.parameters()))
            error = relative_error(self.call(), expected)
        largest({self.name: error}, self.tolerance)


def all_of(case: Case) -> list[Alternative]:
    """The alternatives that a case has."""
    is_cpu = case.device.type == "cpu"
    found = [_batch(case)]
    if (engine := faster_engine(case)) is not None:
        found.append(_engine(case, engine))
    if is_cpu:
        found += [_threads(case, n) for n in sorted({1, processors()} - {torch.get_num_threads()})]
    if case.dtype == torch.float64 or (is_cpu and case.dtype != torch.float32):
        found.append(_dtype(case, torch.float32))
    elif case.dtype == torch.float32 and is_cpu:
        found.append(_bfloat16_weights(case))
    elif case.dtype == torch.float32:
        found.append(_dtype(case, torch.bfloat16))
    if is_cpu and case.steps > 1:
        found.append(_prepacked(case))
    if case.steps == 1:
        found += [_sequence(case), _stream(case)]
    return found


def advice(alternatives: Sequence[Alternative], ratios: Mapping[str, Ratio]) -> list[str]:
    """The sentences of those that are faster beyond the doubt of their intervals."""
    faster = [x for x in alternatives if ratios[x.name].high < WORTH]
    return [x.advice.format(f"{ratios[x.name].of_medians:.2f}") for x in faster]


def _of_unit(
    name: str, advice: str, unit: FusedMCU, operands: Sequence[Tensor], tolerance: float
) -> Alternative:
    return Alternative(name, advice, lambda: unit(*operands)[0], unit, operands, tolerance)


def _batch(case: Case) -> Alternative:
    twice = 2 * case.batch
    alternative = _of_unit(
        f"B = {twice}",
        f"a batch of {twice} takes {{}} of the time per sample of one of {case.batch}",
        case.unit,
        case.operands_of(case.steps, twice),
        case.tolerance,
    )
    return alternative._replace(calls=2)


def _sequence(case: Case) -> Alternative:
    alternative = _of_unit(
        f"T = {STEPS}",
        f"a sequence of {STEPS} steps in one call takes {{}} of the time per step",
        case.unit,
        case.operands_of(STEPS, case.batch),
        case.tolerance,
    )
    return alternative._replace(calls=STEPS)


def _engine(case: Case, name: str) -> Alternative:
    unit = copy.copy(case.unit)
    unit.engine = name
    how = "unset MMIXER_ENGINE" if case.engine == "auto" else 'leave engine at "auto"'
    return _of_unit(
        f'engine="{name}"',
        f'the engine "{name}", which runs here too, takes {{}} of the time: {how}',
        unit,
        case.operands,
        case.tolerance,
    )


def _threads(case: Case, threads: int) -> Alternative:
    before = torch.get_num_threads()

    def call() -> Tensor:
        with torch_threads(threads):
            output: Tensor = case.unit(*case.operands)[0]
        return output

    name, take = ("1 thread", "takes") if threads == 1 else (f"{threads} threads", "take")
    advice = (
        f"{name} {take} {{}} of the time of {before}, which {threads_are_set_by()} asks for: there "
        f"are {processors()} processors"
    )
    return Alternative(name, advice, call, case.unit, case.operands, case.tolerance)


def _dtype(case: Case, dtype: torch.dtype) -> Alternative:
    own, name = (str(x).removeprefix("torch.") for x in (case.dtype, dtype))
    operands = [x.detach().to(dtype) for x in case.operands]
    return _of_unit(
        name,
        f"parameters and inputs in {name} take {{}} of the time of {own}, at {name}'s precision",
        copy.deepcopy(case.unit).to(dtype),
        operands,
        tolerance_of(dtype, case.device),
    )


def _bfloat16_weights(case: Case) -> Alternative:
    return _of_unit(
        "bfloat16 weights",
        "bfloat16 weights beside float32 inputs (unit.bfloat16()) take {} of the time, at the "
        "precision of bfloat16 weights",
        copy.deepcopy(case.unit).bfloat16(),
        case.operands,
        TOLERANCE,
    )


def _prepacked(case: Case) -> Alternative:
    prepacked = PrepackedMCU(case.unit)

    def call() -> Tensor:
        output, _ = prepacked(*case.operands)
        assert isinstance(output, Tensor)
        return output

    advice = "for inference, PrepackedMCU(unit) takes {} of the time: it packs the weights once"
    return Alternative("PrepackedMCU", advice, call, case.unit, case.operands, case.tolerance)


def _stream(case: Case) -> Alternative:
    cell = FusedMCUCell(case.F, case.C, case.hidden_size, engine=case.engine, **case.like)
    cell.load_state_dict(case.unit.state_dict())
    input, *contexts = (x.detach() for x in case.operands)
    stream = CellStream(cell, *contexts, batch_size=case.batch)

    def call() -> Tensor:  # the check is the first call, whose state is zero
        return stream(input[0]).unsqueeze(0)

    advice = "for inference frame by frame, CellStream(cell, context) takes {} of the time"
    return Alternative("CellStream", advice, call, case.unit, case.operands, case.tolerance)
