"""Results of stored seeds on every engine, bit for bit, before a change and after it:

    python tests/bits.py write FILE.json       in a checkout of the one commit
    python tests/bits.py compare FILE.json     in a checkout of the other

FILE has, per engine and case, a hash of each result and the number of bytes that autograd keeps for
backward. `compare` names what differs and ends with exit status 1; less memory is told, and is no
difference. It lives here because the
emulated CUDA engine is built and entered as the tests do it, by the helpers of the checkout that is
measured: the one that `mmixer_kernels` is imported from, which PYTHONPATH chooses. All else is
public interface, so that one copy of this script serves any commit.

Bits depend on the processor, on torch's version and on its BLAS: a FILE says nothing on another
machine, and is not committed. Triton's kernels run in its interpreter, and version 3.6 of that does
not go with NumPy 2.4 (`--engines` leaves an engine out). A run takes about 3 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

# torch and triton read these at import. Threads that wait must not hold a busy processor.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from torch import Tensor

import mmixer_kernels
from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell, MMixer
from mmixer_kernels.functional import Weights, mcu, mcu_cell, mcu_group

CHECKOUT = Path(mmixer_kernels.__file__).parents[1]
CUDA_PATHS = ("cluster", "wide", "cooperative", "step")
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32 beside bfloat16 weights": (torch.float32, torch.bfloat16),
}
# T, B, input, context, H
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 2, 3, 4, 5),
    (7, 13, 17, 5, 31),
    (4, 9, 8, 16, 16),
    (2, 5, 24, 3, 130),
]
BOTH = (False, True)
KEPT = "bytes kept for backward"
ROUNDS = {"reference": 8, "cpu": 8, "cuda": 2, "triton": 1}
"""How often an engine gets each pair of options; kernels that are emulated take their time."""
SEQUENCES = {
    "call": ("mcu", "FusedMCU", "mcu_group of 1", "mcu_group of 3"),
    "size": SIZES,
    "dtype": tuple(DTYPES),
    "mix": ("gated", "concat"),
    "layer_norm": BOTH,
    "hx": BOTH,
    "lengths": BOTH,
    "recompute": BOTH,
    "batch_first": BOTH,
    "matmul_precision": ("highest", "high"),
    "derivatives": (1, 2),
    "threads": (1, 2),
}
STEPS = {
    "call": ("mcu_cell", "FusedMCUCell", "CellStream"),
    "size": SIZES,
    "dtype": tuple(DTYPES),
    "mix": ("gated", "concat"),
    "layer_norm": BOTH,
    "hx": BOTH,
    "threads": (1, 2),
}
NETWORKS = {
    "call": ("MMixer",),
    "modalities": (2, 3),
    "dtype": ("float32", "float64", "bfloat16"),
    "content": ("cross", "self"),
    "mix": ("gated", "concat"),
    "layer_norm": BOTH,
    "lengths": BOTH,
    "threads": (1, 2),
}

Case = dict[str, Any]
Results = dict[str, str | int]


def pairwise(axes: dict[str, Sequence[Any]], seed: int) -> list[Case]:
    """Cases that have each pair of values of two options in one of them at least.

    The same for the same seed: of some random candidates, the one with most pairs that lack yet.
    """
    choose = random.Random(seed)
    names = list(axes)
    lacking = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in axes[a]
        for y in axes[b]
    }

    def pairs(case: Case) -> set[Any]:
        return lacking & set(itertools.combinations(case.items(), 2))

    cases = []
    while lacking:
        pair = choose.choice(sorted(lacking, key=repr))
        candidates = [
            {name: choose.choice(axes[name]) for name in names} | dict(pair) for _ in range(50)
        ]
        cases.append(max(candidates, key=lambda case: len(pairs(case))))
        lacking -= pairs(cases[-1])
    return cases


def every_case(engine: str) -> dict[str, Case]:
    """Cases by name; a case's seed is its place."""
    cases = [
        case
        for round in range(ROUNDS[engine])
        for axes in (SEQUENCES, STEPS, NETWORKS)
        for case in pairwise(axes, round)
    ]
    return {
        f"{seed}: " + ", ".join(f"{name}={value}" for name, value in case.items()): case
        | {"seed": seed}
        for seed, case in enumerate(cases)
    }


class Operands(NamedTuple):
    inputs: list[Tensor]
    contexts: list[Tensor]
    weights: list[Weights]
    hx: Tensor | None
    lengths: Tensor | None

    def named(self) -> dict[str, Tensor]:
        named = {} if self.hx is None else {"hx": self.hx}
        for g, weights in enumerate(self.weights):
            named |= {f"inputs[{g}]": self.inputs[g], f"contexts[{g}]": self.contexts[g]}
            for name, weight in weights._asdict().items():
                if weight is not None:
                    named[f"weights[{g}].{name}"] = weight
        return named


def operands(case: Case, groups: int, steps: int | None = None) -> Operands:
    dtype, weight_dtype = DTYPES[case["dtype"]]
    T, B, input_size, context_size, H = case["size"]
    T = steps or T

    def leaf(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    sets = []
    inputs, contexts = [], []
    for g in range(groups):
        f, c = input_size + g, context_size + 2 * g
        inputs.append(leaf(*((B, T, f) if case.get("batch_first") else (T, B, f))))
        contexts.append(leaf(B, c))
        shapes = [(H, f), (H, c), (H, 2 * H), (H, H), (H, H), (H, H)]
        matrices = [leaf(*shape, dtype=weight_dtype, scale=H**-0.5) for shape in shapes]
        norms = [leaf(6, H, dtype=weight_dtype) if case["layer_norm"] else None for _ in range(2)]
        sets.append(Weights(*matrices, *norms))
    hx = leaf(groups, B, H) if case["hx"] else None
    lengths = torch.randint(1, T + 1, (B,)) if case.get("lengths") else None
    return Operands(inputs, contexts, sets, hx, lengths)


def sequence(case: Case, engine: str) -> tuple[Callable[[], Sequence[Tensor]], dict[str, Tensor]]:
    """The call, which gives output and h_n, and what it has gradients of."""
    options = {name: case[name] for name in ("mix", "recompute", "batch_first")}
    options["engine"] = engine
    o = operands(case, 3 if case["call"] == "mcu_group of 3" else 1)
    if case["call"].startswith("mcu_group"):
        return lambda: mcu_group(*o, **options), o.named()
    if case["call"] == "mcu":
        one = (o.inputs[0], o.contexts[0], o.weights[0], o.hx, o.lengths)
        return lambda: mcu(*one, **options), o.named()
    unit = FusedMCU(*case["size"][2:], layer_norm=case["layer_norm"], **options)
    unit.to(DTYPES[case["dtype"]][1])
    rest = (o.inputs[0], o.contexts[0], o.hx, o.lengths)
    return lambda: unit(*rest), of_module(unit, o)


def step(case: Case, engine: str) -> tuple[Callable[[], Sequence[Tensor]], dict[str, Tensor]]:
    """The same as `sequence`, for calls that give the next state."""
    o = operands(case, 1, steps=3)
    frames, context, weights = o.inputs[0], o.contexts[0], o.weights[0]
    hx = None if o.hx is None else o.hx[0]
    if case["call"] == "mcu_cell":
        options = {"mix": case["mix"], "engine": engine}
        return lambda: [mcu_cell(frames[0], context, weights, hx, **options)], o.named()
    options = {"mix": case["mix"], "layer_norm": case["layer_norm"], "engine": engine}
    cell = FusedMCUCell(*case["size"][2:], **options)
    cell.to(DTYPES[case["dtype"]][1])
    if case["call"] == "FusedMCUCell":
        return lambda: [cell(frames[0], context, hx)], of_module(cell, o)

    def stream() -> list[Tensor]:
        with torch.no_grad():
            states = CellStream(cell, context, hx)
            return [states(frame).clone() for frame in frames]

    return stream, {}


def network(case: Case, engine: str) -> tuple[Callable[[], Sequence[Tensor]], dict[str, Tensor]]:
    """The same as `sequence`, for calls that give logits."""
    dtype = DTYPES[case["dtype"]][0]
    options = {name: case[name] for name in ("content", "mix", "layer_norm")}
    sizes = [6, 5, 9][: case["modalities"]]
    mixer = MMixer(sizes, 4, hidden_size=20, engine=engine, dtype=dtype, **options)
    features = [torch.randn(3, 5, size, dtype=dtype).requires_grad_() for size in sizes]
    lengths = torch.tensor([5, 2, 1]) if case["lengths"] else None
    named = {f"features[{i}]": x for i, x in enumerate(features)} | dict(mixer.named_parameters())
    return lambda: [mixer(features, lengths)], named


def of_module(module: torch.nn.Module, o: Operands) -> dict[str, Tensor]:
    others = {name: x for name, x in o.named().items() if not name.startswith("weights")}
    return others | dict(module.named_parameters())


CALLS = {"MMixer": network, "mcu_cell": step, "FusedMCUCell": step, "CellStream": step}


def results(case: Case, engine: str) -> Results:
    """Hashes of operands (a module's initial values are among them), of what the call gives with
    and without gradients, and of the gradients; and the bytes that it keeps for backward."""
    torch.manual_seed(case["seed"])
    torch.set_num_threads(case["threads"])
    torch.set_float32_matmul_precision(case.get("matmul_precision", "highest"))
    call, named = CALLS.get(case["call"], sequence)(case, engine)
    found: Results = {f"operand {name}": digest(x) for name, x in named.items()}
    with torch.no_grad():
        found |= {f"result {i} without gradients": digest(x) for i, x in enumerate(call())}
    if not named:
        return found
    kept: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in named.values()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call()
    found[KEPT] = sum(kept.values())
    found |= {f"result {i}": digest(x) for i, x in enumerate(outputs)}
    twice = case.get("derivatives") == 2
    for _ in range(2 if twice else 1):
        cotangents = [torch.randn_like(x) for x in outputs]
        order = "second derivative" if f"gradient of {next(iter(named))}" in found else "gradient"
        grads = torch.autograd.grad(
            outputs, list(named.values()), cotangents, create_graph=twice, materialize_grads=True
        )
        found |= {f"{order} of {name}": digest(x) for name, x in zip(named, grads, strict=True)}
        outputs = [x for x in grads if x.requires_grad]
    return found


def digest(x: Tensor) -> str:
    values = x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{x.dtype} {list(x.shape)}".encode() + values).hexdigest()[:16]


@contextmanager
def on_cpu_tensors(engine: Any, **attributes: Any) -> Iterator[None]:
    """The engine takes CPU tensors inside the context, and has these attributes there."""
    state = mmixer_kernels.EngineState(True, "made to take CPU tensors")
    attributes["state"] = lambda device=None: state
    # Some commits name an engine's devices by DEVICES, others by `unsupported`.
    attributes |= {"DEVICES": ("cpu",), "unsupported": lambda input: None}
    before = {name: vars(engine)[name] for name in attributes if name in vars(engine)}
    vars(engine).update((name, attributes[name]) for name in before)
    try:
        yield
    finally:
        vars(engine).update(before)


def emulated() -> Any:
    """The CUDA engine's extension whose kernels run on this CPU, of the checkout."""
    sys.path.insert(0, str(CHECKOUT / "tests"))
    from building import build

    library = build("_emulated") / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.configure()
    return module


def contenders(chosen: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """A name for FILE, the engine, and the context in which it is called."""
    if "reference" in chosen:
        yield "reference", "reference", nullcontext()
    if "cpu" in chosen:
        from mmixer_kernels import _native

        default = _native.build_info()["instruction_set"]
        for name in _native.build_info()["instruction_sets_here"]:
            _native.use_instruction_set(name)
            yield f"cpu, {name}", "cpu", nullcontext()
        _native.use_instruction_set(default)
    if "cuda" in chosen:
        from mmixer_kernels.engines import cuda

        native = emulated()
        from helpers import forget_cuda_calls

        for paths in (cuda.PATHS, *((path,) for path in CUDA_PATHS)):
            forget_cuda_calls()
            name = "cuda, " + " ".join(paths)
            yield name, "cuda", on_cpu_tensors(cuda, _native=native, PATHS=paths)
    if "triton" in chosen:
        from mmixer_kernels.engines import triton

        yield "triton", "triton", on_cpu_tensors(triton)


def measure(chosen: Sequence[str]) -> dict[str, dict[str, Results]]:
    measured: dict[str, dict[str, Results]] = {}
    for name, engine, context in contenders(chosen):
        measured[name] = {}
        start, refused = time.perf_counter(), 0
        with context:
            for label, case in every_case(engine).items():
                try:
                    found = results(case, engine)
                except RuntimeError as error:
                    if "no path of" not in str(error):
                        raise
                    refused += 1
                    found = {"refused": "by the path"}
                measured[name][label] = found
        print(
            f"{name}: {len(measured[name])} cases, of which {refused} are refused, "
            f"{time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )
    return measured


def machine() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def differences(before: dict[str, Any], after: dict[str, Any], where: str = "") -> list[str]:
    """A line for each engine, case or result that is in one alone, or differs."""
    lines = []
    for name in {**before, **after}:
        if name not in before or name not in after:
            lines.append(f"{where}{name}: only {'before' if name in before else 'after'}")
        elif isinstance(before[name], dict):
            lines += differences(before[name], after[name], f"{where}{name}: ")
        elif name == KEPT and after[name] < before[name]:
            print(f"less memory: {where}{before[name]} bytes before, {after[name]} after")
        elif before[name] != after[name]:
            lines.append(f"{where}{name}: {before[name]} before, {after[name]} after")
    return lines


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--engines", nargs="+", choices=tuple(ROUNDS), default=tuple(ROUNDS))
    options = parser.parse_args(words)
    before = json.loads(options.file.read_text()) if options.action == "compare" else None
    print(f"of {CHECKOUT}", file=sys.stderr)
    after = {"machine": machine(), "results": measure(options.engines)}
    if before is None:
        temporary = options.file.with_name(options.file.name + ".temporary")
        temporary.write_text(json.dumps(after, indent=1))
        temporary.replace(options.file)
        return 0
    if before["machine"] != after["machine"]:
        print(f"another machine: {before['machine']}, here {after['machine']}", file=sys.stderr)
    chosen = {k: v for k, v in before["results"].items() if k.split(",")[0] in options.engines}
    lines = differences(chosen, after["results"])
    print("\n".join(lines[:200]))
    print(f"{len(lines)} differences" if lines else "equal bits, equal memory", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
