"""`python benchmarks/latency_model.py`: what a step of the recurrence costs, predicted.

The machine code of a kernel's loop over time, as cuobjdump prints it, is run by a model of one warp.
An instruction starts when the one before allows it and when the counters that it waits for are at
zero (`sass.Instruction`); how long a counter waits for what has no fixed latency is in the table
below. What a warp sends arrives everywhere a hop later, and a wait ends when the last message of its
channel has arrived, which in a team is that of any block: they all do the same at the same time.

So a step is a cycle of waits, each of which ends a hop after a send. `work` is what lies between: from
the return of a wait to the last send that the next one waits for. What a warp does while messages
travel costs nothing as long as a hop takes longer.

Not in the model: other warps (two share a scheduler and its tensor core), bank conflicts, the bytes
that cross the network, and what is late in memory. It orders variants of one kernel; it does not
replace a measurement.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sass
from sass import NONE, Instruction, Kernel

LATENCIES = {
    # Opcode: cycles from its start to its result, longest opcode first.
    "LDS": 30,  # [1]
    "LDG": 600,  # [1]: 480 from memory without load, 260 from L2; [3]
    "SHFL": 24,  # [2]
    "MUFU": 28,  # [2]
    "FCHK": 22,  # [2]
    "F2F": 22,  # [2]
    "HMMA": 33,  # [1]: m16n8k16 with float32 sums
    "BAR": 30,  # [2]: all warps of a block come at the same time
    "SYNCS": 30,  # [3]: the return of a wait whose phase has ended
    "S2R": 24,  # [2]
    "S2UR": 24,  # [2]
    "LDC": 30,  # [3]
    "R2UR": 12,  # [3]
}
"""Of an H100. Fixed latencies (4 to 6 cycles for most arithmetic) are in the machine code itself.

[1] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv:2402.13499.
[2] Ampere's, as published by others; nothing is known of Hopper's.
[3] An estimate.
"""
OPERANDS_READ = 14
"""Cycles until what has no fixed latency has read its operands: an estimate."""
OTHERS = 24
"""Cycles to the result of what the table does not name: an estimate."""
HOP = 200
"""Cycles from a store to another block's barrier, an estimate: 180 for a load of its memory [1]."""
BYTES_PER_CYCLE = 32
"""Into a multiprocessor from its cluster, an estimate: 11 to 14 were seen by loads [1]."""


class Wait(NamedTuple):
    """A wait of a step, in cycles from the return of the wait before it."""

    channel: str
    work: int  # until the last send that this one waits for
    hidden: int  # from there until this wait begins, behind the hop
    hop: int  # from that send to its arrival
    exposed: bool  # whether the message was still on its way when this wait began


@dataclass(frozen=True)
class Prediction:
    kernel: Kernel
    instructions: int
    cycles: int  # of a step, hops included
    waits: tuple[Wait, ...]

    @property
    def work(self) -> int:
        """Cycles of a step that are neither a hop nor the return of a wait."""
        return self.cycles - sum(
            wait.hop + LATENCIES["SYNCS"] for wait in self.waits if wait.exposed
        )


def latency(instruction: Instruction) -> int:
    return next((n for name, n in LATENCIES.items() if instruction.is_a(name)), OTHERS)


def _registers(text: str, count: int = 1) -> set[str]:
    """Of an operand: `count` from the one that it names."""
    found = re.match(r"R(\d+)", text)
    return {f"R{int(found[1]) + i}" for i in range(count)} if found else set()


class _Products:
    """When the tensor core's results are there: the counters do not tell."""

    def __init__(self) -> None:
        self.ready: dict[str, int] = {}

    def needed_at(self, instruction: Instruction) -> int:
        operands = instruction.operands.split(", ")
        if instruction.is_a("HMMA"):
            read = _registers(operands[1], 4) | _registers(operands[2], 2)
            # Its sums go from one product to the next, as fast as the code says.
        else:
            read = set(re.findall(r"R\d+", ", ".join(operands[1:])))
        return max((self.ready.get(register, 0) for register in read), default=0)

    def start(self, instruction: Instruction, time: int) -> None:
        target = instruction.operands.split(", ")[0]
        registers = _registers(target, 4 if instruction.is_a("HMMA") else 1)
        if instruction.is_a("HMMA"):
            self.ready.update(dict.fromkeys(registers, time + LATENCIES["HMMA"]))
        else:
            for register in registers:
                self.ready.pop(register, None)


class _Addresses:
    """Which barrier an instruction of the cluster path names: the registers' values as far as they are
    a constant beside the start of shared memory."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[str, int]] = {"RZ": ("", 0), "URZ": ("", 0)}

    def value(self, text: str) -> tuple[str, int]:
        text = text.replace(".reuse", "").strip()
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return "", int(text, 16)
        return self.values.get(text, (text, 0))

    def sum(self, *texts: str) -> tuple[str, int]:
        values = [self.value(text) for text in texts]
        return "+".join(sorted(name for name, _ in values if name)), sum(n for _, n in values)

    def follow(self, instruction: Instruction) -> None:
        operands = instruction.operands.split(", ")
        target, sources = operands[0], operands[1:]
        if not re.fullmatch(r"U?R\d+", target):
            return
        name = instruction.opcode.split(".")[0]
        if name in ("MOV", "UMOV", "R2UR") or sources[:2] == ["RZ", "RZ"]:  # IMAD.MOV, IMAD.U32
            result = self.value(sources[-1])
        elif name in ("VIADD", "IADD3", "UIADD3") and not any("-" in s for s in sources[1:-1]):
            result = self.sum(*(source for source in sources if source != "!PT"))
        elif instruction.is_a("IMAD.IADD") and sources[1] == "0x1":
            result = self.sum(sources[0], sources[2])
        elif name == "PRMT" and sources[1] == "0x654":  # the same place in another block
            result = self.value(sources[2])
        elif name in ("LEA", "ULEA") and sources[-1] == "0x18":  # the start of shared memory
            result = "shared", 0
        else:
            result = f"{target}@{instruction.address:x}", 0
        self.values[target] = result  # A predicate that guards it also guards its use.

    def barrier(self, instruction: Instruction) -> str:
        found = re.search(r"\[([^\]]+)\]", instruction.operands)
        assert found is not None
        inside = found[1]
        if instruction.is_a("STAS"):  # [Rn.64]: the data's address and, in Rn+1, the barrier's
            number = int(re.findall(r"R(\d+)", inside)[0])
            name, offset = self.value(f"R{number + 1}")
        else:
            name, offset = self.sum(*inside.split("+"))
        return f"{name}+{offset:#x}"


@dataclass(frozen=True)
class _Event:
    """What an instruction of the loop has to do with a channel."""

    kind: str  # "send", "wait" or empty
    channel: str = ""


def _cluster_events(kernel: Kernel, loop: Sequence[Instruction]) -> list[_Event]:
    addresses = _Addresses()
    for instruction in kernel.code:
        if instruction.address == loop[0].address:
            break
        addresses.follow(instruction)
    events: list[_Event] = []
    for instruction in loop:
        if instruction.is_a("STAS"):
            events.append(_Event("send", addresses.barrier(instruction)))
        elif instruction.is_a("SYNCS.PHASECHK"):
            events.append(_Event("wait", addresses.barrier(instruction)))
        else:
            events.append(_Event(""))
        addresses.follow(instruction)
    waits = {event.channel for event in events if event.kind == "wait"}
    sends = {event.channel for event in events if event.kind == "send"}
    if not sends or sends != waits:
        raise ValueError(f"{kernel}: it sends on {sorted(sends)} and waits on {sorted(waits)}")
    return events


def _hops(
    kernel: Kernel, loop: Sequence[Instruction], events: Sequence[_Event], bytes_per_cycle: float
) -> dict[str, int]:
    """Cycles from a channel's last send to its arrival: an operand is bytes, a statistic is few."""
    operand = 2 * kernel.parts * kernel.samples * kernel.hidden
    carries_operand = {
        event.channel
        for instruction, event in zip(loop, events, strict=True)
        if instruction.is_a("STAS.128")
    }
    return {
        event.channel: HOP + round(operand / bytes_per_cycle) * (event.channel in carries_operand)
        for event in events
        if event.kind == "wait"
    }


def _run(
    loop: Sequence[Instruction], events: Sequence[_Event], hops: dict[str, int]
) -> tuple[int, tuple[Wait, ...]]:
    """Cycles of a step, and its waits, once steps have become alike."""
    sent: dict[str, int] = {}
    counters = [0] * 6
    products = _Products()
    now, period, returned = 0, -1, 0
    for _ in range(8):
        begin, waits = now, []
        for instruction, event in zip(loop, events, strict=True):
            start = max([now, products.needed_at(instruction)] + [counters[i] for i in instruction.waits])
            products.start(instruction, start)
            result = start + latency(instruction)
            now = start + max(instruction.stall, 1)
            if instruction.is_a("BAR"):
                now = result
            if event.kind == "send":
                sent[event.channel] = start
            elif event.kind == "wait":
                last = sent.get(event.channel, start)
                hop = hops[event.channel]
                arrival = last + hop
                result = max(start, arrival) + LATENCIES["SYNCS"]
                waits.append(
                    Wait(event.channel, last - returned, start - last, hop, arrival > start)
                )
                returned = result
            if instruction.writes != NONE:
                counters[instruction.writes] = max(counters[instruction.writes], result)
            if instruction.reads != NONE:
                counters[instruction.reads] = max(
                    counters[instruction.reads], start + OPERANDS_READ
                )
        if now - begin == period:
            break
        period = now - begin
    return period, tuple(waits)


def predict(kernel: Kernel, bytes_per_cycle: float = BYTES_PER_CYCLE) -> Prediction:
    loop = sass.loop_over_time(kernel)
    events = _cluster_events(kernel, loop)
    cycles, waits = _run(loop, events, _hops(kernel, loop, events, bytes_per_cycle))
    return Prediction(kernel, len(loop), cycles, waits)


if __name__ == "__main__":
    import sys
    for k in sass.kernels(open(sys.argv[1]).read()):
        p = predict(k)
        print(k, p.instructions, "cycles", p.cycles, "work", p.work)
        for w in p.waits: print("   ", w)
