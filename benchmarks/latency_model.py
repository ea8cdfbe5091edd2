"""`python benchmarks/latency_model.py [FILE]`: what a step of the recurrence costs, predicted.

FILE has nvcc's machine code of the persistent kernels: the extension, which is the default, or an
object.

The code of a kernel's loop over time is run by a model of one warp. An instruction starts when the
one before it allows that and the counters that it waits for are at zero (`sass.Instruction`); for
how long a counter waits, where no latency is fixed, is in the table below. What a warp sends
arrives everywhere a hop later, and a wait ends when the last message of its channel has arrived,
which in a team is that of any block: they all do the same at the same time.

So a step is a circle of waits, each of which ends a hop after a send. `work` is what lies between,
from the end of a wait to the last send that the next one waits for: what a step costs without the
network. What a warp does while a message travels costs nothing as long as the hop takes longer;
`hidden` is how much that is.

Not in the model: other warps (two share a scheduler and its tensor core), bank conflicts, the cost
of an invalidation of L1, the clock, and what comes late from memory. It orders variants of one
kernel; it does not replace a measurement.
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
    # Opcode: cycles from its start to its result.
    "LDS": 30,  # [1]
    "LDG": 600,  # [1]: 480 from memory without load, 260 from L2; [3]
    "SHFL": 24,  # [2]
    "MUFU": 28,  # [2]
    "FCHK": 22,  # [2]
    "F2F": 22,  # [2]
    "HMMA": 33,  # [1]: m16n8k16 with float32 sums
    "BAR": 30,  # [2]: all warps of a block come at the same time
    "SYNCS": 30,  # [3]: from the end of a phase to the return of a wait for it
    "S2R": 24,  # [2]
    "S2UR": 24,  # [2]
    "LDC": 30,  # [3]
    "R2UR": 12,  # [3]
}
"""Latencies of an H100, in cycles. Fixed latencies (4 to 6 cycles for most arithmetic) are in the
machine code itself.

[1] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv:2402.13499.
[2] Ampere's, as published by others; nothing is known of Hopper's.
[3] An estimate.
"""
OPERANDS_READ = 14  # [3]: until what has no fixed latency has read its operands
OTHERS = 24  # [3]: to the result of what the table does not name

HOP = 200  # [3]: from a store to a barrier of another block; a load of its memory takes 180 [1]
BYTES_PER_CYCLE = (32, 12)
"""Into a multiprocessor from its cluster: an estimate, and what was seen by loads, 11 to 14 [1]."""
L2_STORE, L2_LOAD = 350, 270  # [3]: until a store is seen there; [1]
CLOCK = 1.98  # GHz


class Wait(NamedTuple):
    """A wait for what was sent after the one before it had ended, in cycles."""

    channel: str
    work: int  # from the end of the one before until the last send that this one waits for
    hidden: int  # from there until it begins
    hop: int


@dataclass(frozen=True)
class Prediction:
    kernel: Kernel
    instructions: int  # of a step
    waits: tuple[Wait, ...]
    cycles: dict[int, int]  # of a step, by the network's bytes per cycle

    @property
    def work(self) -> int:
        return sum(wait.work for wait in self.waits)


def latency(instruction: Instruction) -> int:
    if instruction.is_a("LDG") and "STRONG" in instruction.opcode:  # a packet
        return L2_LOAD
    return next((n for name, n in LATENCIES.items() if instruction.is_a(name)), OTHERS)


def _registers(text: str, count: int = 1) -> set[str]:
    """The registers of an operand: `count` from the one that it names."""
    found = re.match(r"R(\d+)", text)
    return {f"R{int(found[1]) + i}" for i in range(count)} if found else set()


class _Products:
    """The times at which the tensor core's results are there, which the counters do not tell."""

    def __init__(self) -> None:
        self.ready: dict[str, int] = {}

    def needed_at(self, instruction: Instruction) -> int:
        operands = instruction.operands.split(", ")
        if instruction.is_a("HMMA"):
            read = _registers(operands[1], 4) | _registers(operands[2], 2)
            # The sums, operands[3], need no wait beyond the stall that the code itself names.
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
    """The registers' values, as far as they are the start of shared memory plus a constant: which
    barrier an instruction of the cluster path names follows from them."""

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
        self.values[target] = result  # A predicate that guards this guards its use, too.

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


class _Event(NamedTuple):
    """The part that an instruction of the loop has in a channel."""

    kind: str = ""  # "send", "wait" or empty
    channel: str = ""


def _cluster_events(kernel: Kernel, loop: Sequence[Instruction]) -> list[_Event]:
    """The events of the cluster path, on which a channel is named after its barrier."""
    addresses = _Addresses()
    for instruction in kernel.code:
        if instruction.address == loop[0].address:
            break
        addresses.follow(instruction)
    events = []
    for instruction in loop:
        if instruction.is_a("STAS"):
            events.append(_Event("send", addresses.barrier(instruction)))
        elif instruction.is_a("SYNCS.PHASECHK"):
            events.append(_Event("wait", addresses.barrier(instruction)))
        else:
            events.append(_Event())
        addresses.follow(instruction)
    waits = {event.channel for event in events if event.kind == "wait"}
    sends = {event.channel for event in events if event.kind == "send"}
    if not sends or sends != waits:
        raise ValueError(f"{kernel}: it sends on {sorted(sends)} and waits on {sorted(waits)}")
    return events


def _global_events(loop: Sequence[Instruction]) -> list[_Event]:
    """The events of exchanges through L2: the last look before a barrier waits for all sends."""
    events = [_Event()] * len(loop)
    look = None
    for i, instruction in enumerate(loop):
        if instruction.is_a("LDG") and "STRONG" in instruction.opcode:
            look = i
        elif instruction.is_a("STG") and "STRONG" in instruction.opcode:
            events[i] = _Event("send", "L2")
        elif instruction.is_a("BAR") and look is not None:
            events[look] = _Event("wait", "L2")
            look = None
    return events


class _Network(NamedTuple):
    hops: dict[str, int]  # by channel
    end: int  # cycles from an arrival to the end of a wait


def _network(
    kernel: Kernel, loop: Sequence[Instruction], events: Sequence[_Event], bytes_per_cycle: int
) -> _Network:
    if kernel.path != "cluster":
        return _Network({"L2": L2_STORE}, L2_LOAD)
    operand = 2 * kernel.parts * kernel.samples * kernel.hidden  # bytes; statistics have few
    carries_operand = {
        event.channel
        for instruction, event in zip(loop, events, strict=True)
        if instruction.is_a("STAS.128")
    }
    hops = {
        event.channel: HOP + (event.channel in carries_operand) * operand // bytes_per_cycle
        for event in events
        if event.kind == "wait"
    }
    return _Network(hops, LATENCIES["SYNCS"])


def _run(
    loop: Sequence[Instruction], events: Sequence[_Event], network: _Network
) -> tuple[int, tuple[Wait, ...]]:
    """Cycles of a step, and its waits, once steps have become alike."""
    sent: dict[str, int] = {}
    counters = [0] * 6
    products = _Products()
    now, cycles, returned = 0, -1, 0
    waits: list[Wait] = []
    for _ in range(8):
        begin, waits = now, []
        for instruction, event in zip(loop, events, strict=True):
            needed = (counters[i] for i in instruction.waits)
            start = max(now, products.needed_at(instruction), *needed)
            products.start(instruction, start)
            result = start + latency(instruction)
            if event.kind == "send":
                sent[event.channel] = start
            elif event.kind == "wait":
                last, hop = sent.get(event.channel, start), network.hops[event.channel]
                result = max(start, last + hop) + network.end
                if last >= returned:
                    waits.append(Wait(event.channel, last - returned, start - last, hop))
                    returned = result
            now = result if instruction.is_a("BAR") else start + max(instruction.stall, 1)
            if instruction.writes != NONE:
                counters[instruction.writes] = max(counters[instruction.writes], result)
            if instruction.reads != NONE:
                read = start + OPERANDS_READ
                counters[instruction.reads] = max(counters[instruction.reads], read)
        if now - begin == cycles:
            break
        cycles = now - begin
    return cycles, tuple(waits)


def predict(kernel: Kernel) -> Prediction:
    """The cycles of a kernel's step; ValueError where its loop or barriers are not found."""
    loop = sass.loop_over_time(kernel)
    events = _cluster_events(kernel, loop) if kernel.path == "cluster" else _global_events(loop)
    networks = {b: _network(kernel, loop, events, b) for b in BYTES_PER_CYCLE}
    # Hops longer than all work that they could hide make every wait show.
    slow = networks[BYTES_PER_CYCLE[0]]
    _, waits = _run(loop, events, slow._replace(hops=dict.fromkeys(slow.hops, 10_000)))
    return Prediction(
        kernel,
        len(loop),
        tuple(wait._replace(hop=slow.hops[wait.channel]) for wait in waits),
        {b: _run(loop, events, network)[0] for b, network in networks.items()},
    )


def text(prediction: Prediction) -> str:
    p = prediction
    lines = [
        f"{p.kernel}: {p.instructions} instructions and {p.work} cycles of work in a step",
        *(
            f"    {cycles} cycles, {cycles / CLOCK / 1000:.2f} us"
            + (f", at {b} bytes per cycle" if p.kernel.path == "cluster" else "")
            for b, cycles in p.cycles.items()
            if p.kernel.path == "cluster" or b == BYTES_PER_CYCLE[0]
        ),
        "        work  hidden     hop  channel",
        *(f"    {w.work:8d}{w.hidden:8d}{w.hop:8d}  {w.channel}" for w in p.waits),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="default: the extension")
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--path", default="cluster", help="cluster, cooperative or wide")
    parser.add_argument("--direction", choices=("forward", "backward"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, choices=(4, 8))
    parser.add_argument("--parts", type=int, default=1, help="terms of a float in products")
    options = parser.parse_args()
    if sass.cuobjdump() is None:
        parser.error("there is no cuobjdump: install CUDA's or triton")
    file = options.file
    if file is None:
        from mmixer_kernels import _native

        file = _native.__file__
    wanted = {
        name: value
        for name in ("architecture", "path", "direction", "hidden", "samples", "parts")
        if (value := getattr(options, name)) is not None
    }
    found = [
        kernel
        for kernel in sass.kernels(sass.dump(file, "-sass", "-arch", options.architecture))
        if all(getattr(kernel, name) == value for name, value in wanted.items())
    ]
    if not found:
        parser.error(f"{file} has no kernel of {wanted}")
    for kernel in found:
        print(text(predict(kernel)))


if __name__ == "__main__":
    main()
