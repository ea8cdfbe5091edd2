"""python compile_triton.py CAPABILITY forward|backward H
python compile_triton.py CAPABILITY all

Compiles kernels of the triton engine for a GPU that need not be here. The first prints, of the
recurrence with bfloat16 operands, registers a thread, stack (what it spills) and shared memory, in
bytes. The second compiles each kernel with all that is optional and with nothing of it, in bfloat16
and float64, and prints how many. It is a process of its own, as the tests' interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmixer_kernels.engines import triton as engine
from mmixer_kernels.engines import triton_kernels

OPERANDS = (
    "matrices operands y f_bar g_bar f_tilde grad_a r_h_out f_tilde_h f_tilde_r_h grad_gates "
    "grad_output"
)
"""Of products, in their dtype."""
OPTIONS = {
    "HAS_NORM": "norms grad_norm",
    "HAS_MORE": "grad_y_more",
    "HAS_HX": "hx",
    "HAS_LENGTHS": "lengths",
    "CONCAT": "",
}
"""Of the kernels, and the arguments that are None without."""
SIZES = "G T B H rows gate"
KERNELS = (
    "norm_tanh norm_tanh_backward mix mix_backward reset_gate update_gate recurrence "
    "recurrence_backward"
)


def types_of(kernel: Any, operand: str, state: str) -> dict[str, str]:
    operands = OPERANDS.split()

    def type_of(name: str) -> str:
        if name in SIZES.split():
            return "i32"
        if name.isupper() or name == "eps":
            return "constexpr"
        if name.startswith("stride"):
            return "i64"
        if name == "lengths":
            return "*i64"
        return f"*{operand if name in operands else state}"

    return {name: type_of(name) for name in kernel.arg_names}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **launch: int
) -> Any:
    # What Triton finds out by itself at a call: addresses, H and strides are multiples of 16.
    aligned = [i for i, (name, type) in enumerate(types.items()) if type[0] == "*" or name == "H"]
    aligned += [i for i, name in enumerate(types) if name.startswith("stride")]
    return triton.compile(
        ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options=launch,
    )


def recurrence(capability: int, direction: str, hidden: int) -> tuple[int, int, int]:
    """Registers, stack, shared memory."""
    constants: dict[str, Any] = dict(engine._configuration(hidden, torch.bfloat16))
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"HAS_NORM": True, "HAS_LENGTHS": True, "PRECISION": "tf32"}
    kernel = triton_kernels.recurrence_backward
    if direction == "forward":
        kernel = triton_kernels.recurrence
        constants |= {"eps": 1e-5, "HAS_HX": True}
    result = compiled(kernel, types_of(kernel, "bf16", "fp32"), constants, capability, **launch)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), result.metadata.shared


def everything(capability: int) -> int:
    """The number of kernels compiled."""
    count = 0
    blocks = {"BLOCK_B": 16, "BLOCK_H": 32, "BLOCK_K": 16, "PRECISION": "ieee", "eps": 1e-5}
    for name in KERNELS.split():
        kernel = getattr(triton_kernels, name)
        # A batch or a length must compile nothing.
        looked_at = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
        assert not set(looked_at) & set(SIZES.split()) - {"H"}, (name, looked_at)
        for operand, state in (("bf16", "fp32"), ("fp64", "fp64")):
            for chosen in (True, False):
                types = types_of(kernel, operand, state)
                constants = {key: value for key, value in blocks.items() if key in types}
                for option, names in OPTIONS.items():
                    if option not in types:
                        continue
                    constants[option] = chosen
                    absent = names if not chosen else ""
                    if option == "CONCAT" and chosen:
                        absent = "grad_f_bar grad_g_bar"
                    for argument in absent.split():
                        if argument in types:
                            types[argument], constants[argument] = "constexpr", None
                compiled(kernel, types, constants, capability, num_warps=4)
                count += 1
    return count


if __name__ == "__main__":
    capability, what = int(sys.argv[1]), sys.argv[2]
    if what == "all":
        print(everything(capability))
    else:
        print(*recurrence(capability, what, int(sys.argv[3])))
