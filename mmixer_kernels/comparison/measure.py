"""A case measured: its engine, its time beside other units', its memory, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..command import processors
from ..modules import FusedMCU
from ..provenance import processor
from . import alternatives, machine, memory
from .alternatives import Alternative
from .case import Case
from .checking import check, unit_subject
from .passes import FORWARD, FORWARD_BACKWARD, Forward, contender
from .products import Products, alone
from .timing import WARMING, Contender, Ratio, Times, interleave, ratio, synchronised

OURS, AGAIN, ONE_STEP = "FusedMCU", "FusedMCU, recompute=True", "FusedMCU, T = 1"
EAGER, GRU, LSTM = "eager equations", "nn.GRU", "nn.LSTM"
OTHERS = (AGAIN, EAGER, GRU, LSTM)
IN_TURN, AT_ONCE = "products of one step after another", "products of all steps at once"
CHECKED = 2**31
"""Bytes that the float64 check may take, about: of a longer sequence it checks the first steps."""
_CHECKED_TABLES = 30  # of T x B x H numbers, in the reference's graph and its gradients
WORTH_BYTES = 2**20
"""The memory from which on it is worth a sentence that a call can keep less for backward."""
HALF = 0.5
Calls = dict[str, tuple[nn.Module, list[Tensor]]]
"""Modules and their operands, by name."""


def compare(case: Case, budget: float = 10.0, *, backward: bool = True) -> dict[str, Any]:
    """Everything that `python -m mmixer_kernels.compare` prints, as it prints with --json.

    It runs in this process, with its number of threads, its environment and its torch settings: it
    may be called in a script whose calls are slow, and leaves its random numbers as they were.
    The script's `no_grad`, `inference_mode` and `autocast` do not count.

    Args:
        case: the call, and the engine that it asks for.
        budget: seconds for all rounds, about; at least five of each are made.
        backward: False leaves out the gradients and the memory that is kept for them.

    Raises:
        WrongResult: the unit, or an alternative to it, is farther from float64 than `tolerance`
            allows. Nothing is timed before.
        ValueError: the engine that is asked for is unknown, or takes no tensors of this device.
        RuntimeError: it cannot run here.
    """
    with (
        torch.random.fork_rng([case.device] if case.device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(case.device.type, enabled=False),
    ):
        return _compare(case, budget, backward)


def _compare(case: Case, budget: float, backward: bool) -> dict[str, Any]:
    load = machine.load()
    engine = machine.facts(case)
    steps = _checked_steps(case)
    error = check(unit_subject(case.unit, case.operands_of(steps, case.batch)), case.tolerance)
    others = alternatives.all_of(case)
    for other in others:
        other.check()
    passes = [FORWARD, FORWARD_BACKWARD] if backward else [FORWARD]
    part = budget / (len(passes) + 1)
    missing: dict[str, str] = {}
    calls = _calls(case)
    times = {name: _times(case, calls, name, part, missing) for name in passes}
    ratios = _alternative_ratios(case, others, part)
    seconds = {name: {x: median(t) for x, t in taken.items()} for name, taken in times.items()}
    saved = _saved_bytes(calls, missing) if backward else {}
    advice = alternatives.advice(others, ratios)
    if backward:
        advice += memory_advice(saved, seconds[FORWARD_BACKWARD])
    return {
        "case": _described(case),
        "machine": {
            "processor": processor(),
            "device": _device_name(case.device),
            "processors": processors(),
            "threads": torch.get_num_threads(),
            "load": load,
        },
        "engine": engine,
        "check": {"error": error, "tolerance": case.tolerance, "steps": steps},
        "rounds": {name: len(taken[OURS]) for name, taken in times.items()},
        "seconds": seconds,
        "ratios": {
            name: {x: ratio(taken[OURS], taken[x])._asdict() for x in OTHERS if x in taken}
            for name, taken in times.items()
        },
        "missing": missing,
        "saved_bytes": saved,
        "limits": {name: _limits(case, seconds[name], name) for name in passes},
        "recurrent_weights": 3 * case.hidden_size**2 * case.compute_dtype.itemsize,
        "memories": machine.memories(case.device),
        "alternatives": {name: x._asdict() for name, x in ratios.items()},
        "settings": machine.settings(case),
        "advice": advice,
    }


def _checked_steps(case: Case) -> int:
    of_step = 8 * _CHECKED_TABLES * case.batch * max(case.hidden_size, case.F)
    return max(1, min(case.steps, CHECKED // of_step))


def _described(case: Case) -> dict[str, Any]:
    return {
        "steps": case.steps,
        "batch": case.batch,
        "hidden_size": case.hidden_size,
        "input_size": case.F,
        "context_size": case.C,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": str(case.device),
        "engine": case.engine,
    }


def _device_name(device: torch.device) -> str:
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _calls(case: Case) -> Calls:
    """Ours and its baselines with their operands, by name: torch's own layers see no context."""
    sizes = case.F, case.C, case.hidden_size
    again = FusedMCU(*sizes, engine=case.engine, recompute=True, **case.like)
    eager = reference.MCU(*sizes, **case.like)
    for unit in (again, eager):
        unit.load_state_dict(case.unit.state_dict())
    input = case.operands[:1]
    return {
        OURS: (case.unit, case.operands),
        AGAIN: (again, case.operands),
        EAGER: (eager, case.operands),
        GRU: (nn.GRU(case.F, case.hidden_size, **case.like), input),
        LSTM: (nn.LSTM(case.F, case.hidden_size, **case.like), input),
    }


def _times(case: Case, calls: Calls, passes: str, budget: float, missing: dict[str, str]) -> Times:
    """The rounds of ours, its baselines, the products alone and a call of one step."""
    contenders = []
    for name, (unit, operands) in calls.items():
        if name == AGAIN and passes == FORWARD:
            continue  # as it keeps nothing, it is the same
        candidate = synchronised(contender(name, unit, operands, passes), case.device)
        try:
            candidate.call()
        except RuntimeError as error:  # no kernel for a dtype, or no memory
            if name == OURS:
                raise
            missing[f"{name}, {passes}"] = " ".join(str(error).split())[:200]
        else:
            contenders.append(candidate)
    if case.steps > 1:
        one_step = contender(ONE_STEP, case.unit, case.operands_of(1, case.batch), passes)
        contenders.append(synchronised(one_step, case.device))
    products = Products.of(case, backward=passes == FORWARD_BACKWARD)
    for name, part, count in (
        (IN_TURN, products.in_turn, case.steps),
        (AT_ONCE, products.at_once, 1),
    ):
        contenders.append(synchronised(Contender(name, alone(part, count, case)), case.device))
    return interleave(contenders, budget, warming=WARMING)


def _alternative_ratios(
    case: Case, others: Sequence[Alternative], budget: float
) -> dict[str, Ratio]:
    """The time of each alternative over the case's own, for equal work, of a forward."""

    def timed(name: str, call: Any) -> Contender:
        return synchronised(Contender(name, Forward(call, ())), case.device)

    ours = timed(OURS, lambda: case.unit(*case.operands))
    times = interleave([ours, *(timed(x.name, x.call) for x in others)], budget, warming=WARMING)
    return {x.name: ratio([t / x.calls for t in times[x.name]], times[OURS]) for x in others}


def _saved_bytes(calls: Calls, missing: dict[str, str]) -> dict[str, int]:
    """The bytes that each unit keeps for its backward."""
    return {
        name: memory.saved_bytes(partial(unit, *operands), [*operands, *unit.parameters()])
        for name, (unit, operands) in calls.items()
        if f"{name}, {FORWARD_BACKWARD}" not in missing
    }


def memory_advice(saved: dict[str, int], seconds: dict[str, float]) -> list[str]:
    """A sentence on `recompute=True`, where what it keeps less is worth one."""
    if AGAIN not in saved or saved[OURS] - saved[AGAIN] < WORTH_BYTES:
        return []
    return [
        f"recompute=True keeps {saved[AGAIN] / 1e6:.3g} MB for backward in place of "
        f"{saved[OURS] / 1e6:.3g}, and takes {seconds[AGAIN] / seconds[OURS]:.2f} of the time of "
        "forward + backward"
    ]


def _limits(case: Case, seconds: dict[str, float], passes: str) -> dict[str, Any]:
    """The parts of a pass, in numbers, and the sentence that follows from them."""
    products = Products.of(case, backward=passes == FORWARD_BACKWARD)
    ours = seconds[OURS]
    shares = {IN_TURN: seconds[IN_TURN] / ours, AT_ONCE: seconds[AT_ONCE] / ours}
    if case.steps > 1:
        shares[ONE_STEP] = seconds[ONE_STEP] / ours
    return {
        "operations": products.operations,
        "operations_per_second": products.operations / ours,
        "shares": shares,
        "limit": limit(shares, case.steps),
    }


def limit(shares: dict[str, float], steps: int) -> str:
    """The largest part of a pass, in a sentence.

    Args:
        shares: of its time, those of its products alone, `IN_TURN` and `AT_ONCE`, and, unless it is
            of one step itself, of a call of `ONE_STEP`.
        steps: T, so that the cost that does not grow with T is known from `ONE_STEP`'s share.
    """
    one_step, in_turn, at_once = (shares.get(x, 0.0) for x in (ONE_STEP, IN_TURN, AT_ONCE))
    if steps > 1 and (fixed := (steps * one_step - 1) / (steps - 1)) > HALF:
        return (
            f"the call's fixed cost, about {min(fixed, 1):.0%} of its time, as a call of one step "
            f"takes {one_step:.0%}: longer sequences cost little more"
        )
    if in_turn + at_once < HALF:
        return (
            "everything but the matrix products (norms, gates, starts of operations, threads that "
            f"wait for each other): for all products torch.mm takes {in_turn + at_once:.0%} of its "
            "time"
        )
    if ONE_STEP not in shares:
        products, share = "the matrix products, each weight read for one step", in_turn + at_once
    elif in_turn >= at_once:
        products = "the recurrent products, of which each step waits for the one before"
        share = in_turn
    else:
        products, share = "the products of all steps at once, with inputs and context", at_once
    return f"{products}: for these alone torch.mm takes {share:.0%} of its time"
