"""python compile_triton.py CAPABILITY forward|backward H

Compiles the triton engine's recurrence for a GPU that need not be here, with bfloat16 operands, and
prints its registers a thread, its stack (what it spills) and its shared memory, in bytes. It is a
process of its own, as the tests' interprets.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmixer_kernels.engines import triton as engine
from mmixer_kernels.engines import triton_kernels


def pointers(names: str, type: str) -> dict[str, str]:
    return {name: f"*{type}" for name in names.split()}


def signature(backward: bool) -> dict[str, str]:
    """The types of the recurrence's arguments, for bfloat16 operands."""
    sizes = dict.fromkeys(("G", "T", "B", "H"), "i32")
    if not backward:
        return {
            **pointers("input_gates", "fp32"),
            **pointers("matrices", "bf16"),
            **pointers("norms hx", "fp32"),
            **pointers("lengths", "i64"),
            **pointers("states", "fp32"),
            **pointers("operands", "bf16"),
            **sizes,
        }
    return {
        **pointers("x_hat r_std", "fp32"),
        **pointers("matrices", "bf16"),
        **pointers("norms previous", "fp32"),
        **pointers("lengths", "i64"),
        **pointers("grad_output", "bf16"),
        **dict.fromkeys(("stride_group", "stride_step", "stride_sample"), "i64"),
        **pointers("grad_h", "fp32"),
        **pointers("grad_gates", "bf16"),
        **pointers("grad_f_tilde grad_norm", "fp32"),
        **sizes,
    }


def compile_recurrence(capability: int, backward: bool, hidden: int) -> tuple[int, int, int]:
    constants = dict(engine._configuration(hidden, torch.bfloat16))
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"HAS_NORM": True, "HAS_LENGTHS": True, "PRECISION": "tf32"}
    if not backward:
        constants |= {"eps": 1e-5, "HAS_HX": True}
    types = signature(backward)
    # What Triton finds out by itself at a call: addresses and H are multiples of 16.
    aligned = [i for i, (name, type) in enumerate(types.items()) if type[0] == "*" or name == "H"]
    aligned += [i for i, name in enumerate(types) if name.startswith("stride")]
    compiled = triton.compile(
        ASTSource(
            triton_kernels.recurrence_backward if backward else triton_kernels.recurrence,
            {**types, **dict.fromkeys(constants, "constexpr")},
            constants,
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=launch,
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), compiled.metadata.shared


if __name__ == "__main__":
    print(*compile_recurrence(int(sys.argv[1]), sys.argv[2] == "backward", int(sys.argv[3])))
