"""python compile_triton.py TARGET resources [DTYPE...]
python compile_triton.py TARGET all

Compiles kernels of the triton engine for a GPU that need not be here: TARGET is a CUDA compute
capability (90) or an AMD architecture (gfx942). The first prints a line for each kernel that has
products, in each DTYPE (bf16 fp32 fp64) and its default configuration: name, dtype, registers
per thread, stack (what it spills) and shared memory, in bytes. The second compiles each kernel with
all that is optional and with nothing of it, in bfloat16 and float64, and prints how many. It is a
process of its own, as the tests' interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmixer_kernels.engines import triton_kernels, triton_pass, triton_tuning

OPERANDS = (
    "operands f_bar g_bar f_tilde grad_a r_h_out f_tilde_h f_tilde_r_h grad_gates grad_output "
    "input context weight_f weight_g weight_s weight_r weight_z weight_h f_g state_operand output"
)
"""Operands of products, in their dtype."""
ALSO = (("x", "products"), ("y", "norm_tanh"), ("hx", "step"))
SETS = 2
OPTIONS = {
    "NORM_ROWS": (6, 0, "norms grad_norm"),
    "HAS_CONTEXT": (True, False, "context weight_g weight_s f_g"),
    "HAS_MORE": (True, False, "grad_y_more"),
    "HAS_HX": (True, False, "hx"),
    "HAS_LENGTHS": (True, False, "lengths"),
    "BIDIRECTIONAL": (True, False, ""),
    "CONCAT": (True, False, ""),
}
"""Options of the kernels with and without what they are for, and the arguments that are None
without."""
SIZES = "G T B H F C rows gate"
KERNELS = (
    "norm_tanh norm_tanh_backward mix mix_backward reset_gate update_gate products step "
    "recurrence recurrence_backward"
)


WITH_PRODUCTS = "products step recurrence recurrence_backward"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
Signature = dict[str, Any]


def target_of(word: str) -> GPUTarget:
    return GPUTarget("cuda", int(word), 32) if word.isdigit() else GPUTarget("hip", word, 64)


def types_of(kernel: Any, operand: str) -> Signature:
    state = "fp64" if operand == "fp64" else "fp32"

    def type_of(name: str) -> Any:
        if name == "matrices":
            return (f"*{operand}",) * 3 * SETS
        if name in SIZES.split():
            return "i32"
        if name.isupper() or name == "eps":
            return "constexpr"
        if name.startswith("stride"):
            return "i64"
        if name == "lengths":
            return "*i64"
        is_operand = name in OPERANDS.split() or (name, kernel.fn.__name__) in ALSO
        return f"*{operand if is_operand else state}"

    return {name: type_of(name) for name in kernel.arg_names}


def compiled(
    kernel: Any, types: Signature, constants: dict[str, Any], target: GPUTarget, **launch: int
) -> Any:
    # Triton finds out by itself at a call that addresses, H and strides are multiples of 16.
    places = []
    for i, (name, type) in enumerate(types.items()):
        if isinstance(type, tuple):
            places += [(i, j) for j in range(len(type))]
        elif type[0] == "*" or name == "H" or name.startswith("stride"):
            places.append((i,))
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    return triton.compile(
        ASTSource(kernel, types, constants, aligned), target=target, options=launch
    )


def resources(target: GPUTarget, dtypes: Sequence[str]) -> None:
    for name in WITH_PRODUCTS.split():
        kernel = getattr(triton_kernels, name)
        for operand in dtypes:
            launch: dict[str, Any] = triton_tuning.default(DTYPES[operand])._asdict()
            precision = "tf32" if target.backend == "cuda" and operand == "fp32" else "ieee"
            choice = {"SETS": SETS, "PRECISION": precision, "eps": 1e-5, "FIRST": 0, "COUNT": 2}
            choice |= {option: value for option, (value, *_) in OPTIONS.items()}
            choice |= {"CONCAT": False}
            choice |= {"BLOCK_B": triton_pass.BLOCK_B, "BLOCK_M": triton_pass.BLOCK_M}
            choice |= {key: launch.pop(key) for key in ("BLOCK_N", "BLOCK_K")}
            types = types_of(kernel, operand)
            constants = {key: value for key, value in choice.items() if key in types}
            result = compiled(kernel, types, constants, target, **launch)
            print(name, operand, *usage(result, target), result.metadata.shared)


def usage(result: Any, target: GPUTarget) -> tuple[int, int]:
    """The registers and the bytes of stack per thread."""
    if target.backend == "hip":
        text = result.asm["amdgcn"]
        registers, stack = (
            re.search(rf"\.{name}:\s+(\d+)", text)
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(result.asm["cubin"])
            cubin.flush()
            command = [cuobjdump, "-res-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    assert registers is not None, text
    assert stack is not None, text
    return int(registers[1]), int(stack[1])


def everything(target: GPUTarget) -> int:
    """The number of kernels compiled."""
    count = 0
    blocks = {"BLOCK_B": 16, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_H": 32, "BLOCK_K": 16}
    blocks |= {"PRECISION": "ieee", "eps": 1e-5, "SETS": SETS, "FIRST": 1, "COUNT": 2}
    for name in KERNELS.split():
        kernel = getattr(triton_kernels, name)
        # A batch or a length must compile nothing.
        looked_at = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
        assert not set(looked_at) & set(SIZES.split()) - {"H", "F", "C"}, (name, looked_at)
        for operand in ("bf16", "fp64"):
            for chosen in (True, False):
                types = types_of(kernel, operand)
                constants = {
                    key: value for key, value in blocks.items() if types.get(key) == "constexpr"
                }
                for option, (value, other, names) in OPTIONS.items():
                    if option not in types:
                        continue
                    constants[option] = value if chosen else other
                    absent = names if not chosen else ""
                    if option == "CONCAT" and chosen:
                        absent = "grad_f_bar grad_g_bar"
                    for argument in absent.split():
                        if argument in types:
                            types[argument], constants[argument] = "constexpr", None
                compiled(kernel, types, constants, target, num_warps=4)
                count += 1
    return count


if __name__ == "__main__":
    target = target_of(sys.argv[1])
    if sys.argv[2] == "all":
        print(everything(target))
    else:
        resources(target, sys.argv[3:] or list(DTYPES))
