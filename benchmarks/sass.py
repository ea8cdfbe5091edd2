"""The machine code that nvcc made of the recurrence's kernels, as cuobjdump prints it.

An instruction of compute capability 7.0 and newer is 128 bits, of which 17 tell the hardware when
it may start: how long the next one waits, which of six counters it increases until its result is
written or its operands are read, and which of them must be at zero before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

NONE = 7  # in the place of a counter's number


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@!P0", or empty
    opcode: str  # with its suffixes: "LDS.128"
    operands: str
    stall: int  # cycles until the next instruction may start
    writes: int  # the counter that waits for its result, or NONE
    reads: int  # the counter that waits until its operands have been read, or NONE
    waits: tuple[int, ...]  # the counters that must be at zero before it starts

    def is_a(self, *opcodes: str) -> bool:
        """Whether the opcode is one of these, with any suffix."""
        return any(f"{self.opcode}.".startswith(f"{name}.") for name in opcodes)

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        if not self.is_a("BRA") or self.opcode == "BRA.DIV":
            return None
        return int(self.operands.split(", ")[-1], 16)


@dataclass(frozen=True)
class Kernel:
    """A persistent kernel. The numbers are those of `Layout` in csrc/cuda/layout.h."""

    name: str
    architecture: str
    direction: str  # "forward", "backward"
    path: str  # "cluster", "cooperative", "wide"
    hidden: int
    blocks: int
    warps: int
    parts: int
    resident: int
    samples: int
    terms: int  # `Dtype` in csrc/problem.h
    code: tuple[Instruction, ...] = field(repr=False)

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows per warp."""
        return self.hidden // self.blocks // 16 // self._row_groups

    @property
    def k_blocks(self) -> int:
        """Blocks of 32 columns per warp."""
        return self.hidden // 32 // (self.warps // self._row_groups)

    @property
    def _row_groups(self) -> int:
        tiles = self.hidden // self.blocks // 16
        return tiles if self.warps % tiles == 0 else 1

    def __str__(self) -> str:
        return (
            f"{self.architecture} {self.path} {self.direction}, H = {self.hidden}, "
            f"{self.samples} samples, {self.parts} {'float16' if self.terms == 3 else 'bfloat16'}"
        )

    def count(self, *opcodes: str) -> int:
        return sum(instruction.is_a(*opcodes) for instruction in self.code)


def cuobjdump() -> str | None:
    """CUDA's program, or the one that triton brings; None: there is neither."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [os.environ.get("PATH", os.defpath), os.path.join(cuda, "bin")]
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def dump(file: str | Path, *options: str) -> str:
    """The text that cuobjdump prints for a file with code for GPUs."""
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("there is no cuobjdump: install CUDA's or triton")
    words = [program, *options, str(file)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


_LAYOUT = re.compile(
    r"(Forward|Backward)INS\w*?LayoutI((?:L(?:i|NS\d?_5DtypeE)\d+E)+)E\w*?(Cluster|Cooperative|Wide)Path"
)
_LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+ )?\s*"
    r"(?P<opcode>[A-Z]\w*(?:\.\w+)*)\s*(?P<operands>[^;]*?)\s*"
    r"(?:[&?]\w[^;]*)?;\s+/\* 0x[0-9a-f]{16} \*/\s*"  # from 10.0 on with what control says
    r"\n\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)


def _instructions(body: str) -> Iterator[Instruction]:
    for found in _LINE.finditer(body):
        # Bits 105 to 121 of the instruction.
        control = int(found["high"], 16) >> 41
        yield Instruction(
            int(found["address"], 16),
            (found["predicate"] or "").strip(),
            found["opcode"],
            found["operands"],
            stall=control & 15,
            writes=control >> 5 & 7,
            reads=control >> 8 & 7,
            waits=tuple(i for i in range(6) if control >> 11 & 1 << i),
        )


def kernels(text: str) -> Iterator[Kernel]:
    """The persistent kernels in what `cuobjdump -sass` printed."""
    for part in re.split(r"^\s*code for ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split()[0]
        for body in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            name = body.split()[0]
            found = _LAYOUT.search(name)
            if found is None:
                continue
            direction, numbers, path = found.groups()
            yield Kernel(
                name,
                architecture,
                direction.lower(),
                path.lower(),
                *map(int, re.findall(r"(?:Li|DtypeE)(\d+)E", numbers)),
                tuple(_instructions(body)),
            )


def loop_over_time(kernel: Kernel) -> tuple[Instruction, ...]:
    """The instructions of a step in the order in which a warp takes them, where nothing is late.

    A branch forward is not taken: it leads to another look at a barrier, or past what a warp
    without rows has not to do. Where it leads around a call, to the slow path of a division for
    instance, it is taken.
    """
    code = kernel.code
    places = {instruction.address: i for i, instruction in enumerate(code)}
    products = [i for i, instruction in enumerate(code) if instruction.is_a("HMMA")]
    # The loop begins before all products and ends behind them; of several such, the innermost. What
    # is rarely taken stands behind the kernel's end, and jumps back from there.
    end = next(i for i in range(products[-1], len(code)) if code[i].opcode == "EXIT")
    spans = [
        (i - places[instruction.target], places[instruction.target], i)
        for i, instruction in enumerate(code)
        if instruction.target in places
        and places[instruction.target] <= products[0]
        and products[-1] < i < end
    ]
    if not spans:
        raise ValueError(f"{kernel}: there is no loop around its products")
    _, first, last = min(spans)
    path = []
    i = first
    while i <= last:
        instruction = code[i]
        path.append(instruction)
        target = places.get(instruction.target, 0) if instruction.target is not None else 0
        always = not instruction.predicate
        skipped = code[i + 1 : target]
        around_call = any(other.is_a("CALL") for other in skipped) and not any(
            other.is_a("BRA") for other in skipped
        )
        i = target if target > i and (always or around_call) else i + 1
    taken = sum(instruction.is_a("HMMA") for instruction in path)
    if taken != len(products):
        raise ValueError(f"{kernel}: of {len(products)} products per step takes {taken}")
    return tuple(path)
