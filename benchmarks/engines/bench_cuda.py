"""The CUDA engine beside torch's own recurrent layers (cuDNN) and the eager reference.

A step's time is the slope between T = 64 and T = 1024 (`gpu_table.py`). nn.GRU and nn.LSTM compute
other equations, without LayerNorm and context; FlashRNN's get the products with their input for
nothing. A run may be cut off, so what matters most comes first. What takes long to compile has
"compiled" in its name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import problems
import pytest
import torch
from clocks import add_if_it_runs
from conftest import Compare
from problems import Group, Layers, Size, StackForm
from torch import Tensor, nn

from mmixer_kernels import engines, functional, reference
from mmixer_kernels.comparison.passes import PASSES, contender
from mmixer_kernels.comparison.timing import Contender
from mmixer_kernels.engines import cuda

STATE = engines()["cuda"]
pytestmark = pytest.mark.skipif(not STATE.available, reason=f"engine cuda: {STATE.reason}")

GPU = torch.device("cuda")
LENGTHS = (64, 1024)
HIDDEN, BATCH, MODALITIES = 512, 8, 3
WIDE_HIDDEN, WIDE_BATCH = 768, 16
PATHS = ("cluster", "cooperative", "step")
BASELINES = {"nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}
SINGLE = ("FusedMCU", *BASELINES)


class Precision(NamedTuple):
    dtype: torch.dtype
    matmul: str  # torch.get_float32_matmul_precision()
    tolerance: float  # of a relative error, also of gradients


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, "highest", 5e-2),
    "float16": Precision(torch.float16, "highest", 1e-2),
    "float32-high": Precision(torch.float32, "high", 5e-3),
    "float32": Precision(torch.float32, "highest", 1e-4),
}
WIDE_PRECISIONS = ("bfloat16", "float16")
OTHER_SIZES = [(128, 8), (256, 8), (768, 8), (1024, 8), (512, 1), (512, 32), (512, 64)]

every_pass = pytest.mark.parametrize("passes", PASSES)
every_length = pytest.mark.parametrize("steps", LENGTHS, ids=lambda x: f"T{x}")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The settings that a benchmark changes; gives its memory back."""
    precision = torch.get_float32_matmul_precision()
    paths, samples = cuda.PATHS, cuda.SAMPLES
    yield
    torch.set_float32_matmul_precision(precision)
    cuda.PATHS, cuda.SAMPLES = paths, samples
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@every_length
@every_pass
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sequence(compare_on_gpu: Compare, precision: str, passes: str, steps: int) -> None:
    size = Size(steps, BATCH, HIDDEN)
    eager = ("eager reference",) if precision == "bfloat16" else ()  # a second per call
    _sequence(compare_on_gpu, size, precision, passes, (*SINGLE, *eager))


@every_length
@every_pass
def test_group(compare_on_gpu: Compare, passes: str, steps: int) -> None:
    """N modalities in one call beside one."""
    size = Size(steps, BATCH, HIDDEN)
    chosen = _precision("bfloat16")
    error = problems.check_group(size, MODALITIES, "cuda", GPU, 1, chosen.dtype, chosen.tolerance)
    group = Group.random(size, MODALITIES, GPU, chosen.dtype)
    single = Group(*(x[:1] for x in group))
    contenders = [
        _grouped(f"one call of N = {len(part.inputs)}", part, passes) for part in (group, single)
    ]
    compare_on_gpu(
        f"functional.mcu_group, bfloat16, {passes}",
        str(size),
        contenders,
        error=error,
        settings=_settings("group", size, "bfloat16", passes),
        on_gpu=[x.name for x in contenders],
        missing={},
    )


@every_length
@every_pass
def test_path(compare_on_gpu: Compare, passes: str, steps: int) -> None:
    """The paths beside each other, each by itself."""
    _paths(compare_on_gpu, PATHS, "paths", "Paths of the CUDA engine", passes, steps)


@pytest.mark.parametrize("steps", [9, 13], ids=lambda x: f"T{x}")
@every_pass
@pytest.mark.parametrize("modalities", [1, 2, 3], ids=lambda x: f"N{x}")
def test_paper(compare_on_gpu: Compare, modalities: int, passes: str, steps: int) -> None:
    """The paper's own calls: the context of a modality is the content of all others."""
    size = Size(steps, BATCH, HIDDEN)
    chosen = _precision("bfloat16")
    error = problems.check_group(
        *(size, modalities, "cuda", GPU, 1, chosen.dtype, chosen.tolerance),
        _context_size(modalities),
    )
    contenders = _of_paper(size, modalities, passes, chosen.dtype)
    compare_on_gpu(
        f"functional.mcu_group of N beside N calls, bfloat16, {passes}",
        f"{size}, N = {modalities}",
        contenders,
        error=error,
        settings={**_settings("paper", size, "bfloat16", passes), "modalities": modalities},
        on_gpu=[x.name for x in contenders],
        missing={},
    )


@every_length
@every_pass
@pytest.mark.parametrize("precision", WIDE_PRECISIONS)
def test_wide(compare_on_gpu: Compare, precision: str, passes: str, steps: int) -> None:
    """The case that others have published cuDNN's time of."""
    size = Size(steps, WIDE_BATCH, WIDE_HIDDEN)
    _sequence(compare_on_gpu, size, precision, passes, SINGLE)


@every_pass
@pytest.mark.parametrize(
    ("precision", "batch", "hidden"),
    [(precision, BATCH, HIDDEN) for precision in PRECISIONS]
    + [(precision, WIDE_BATCH, WIDE_HIDDEN) for precision in WIDE_PRECISIONS],
)
def test_kernels_of_sequence(
    count_kernels: Compare, precision: str, batch: int, hidden: int, passes: str
) -> None:
    """The kernels, ours and cuDNN's, of test_sequence's and test_wide's shortest length."""
    size = Size(LENGTHS[0], batch, hidden)
    count_kernels(
        f"Kernels, {precision}, {passes}",
        str(size),
        _contenders(size, passes, _precision(precision), SINGLE),
        settings=_settings("kernels", size, precision, passes),
    )


@pytest.mark.parametrize("steps", [9], ids=lambda x: f"T{x}")
@every_pass
@pytest.mark.parametrize("modalities", [1, 3], ids=lambda x: f"N{x}")
def test_kernels_of_paper(count_kernels: Compare, modalities: int, passes: str, steps: int) -> None:
    size = Size(steps, BATCH, HIDDEN)
    count_kernels(
        f"Kernels of N = {modalities}, bfloat16, {passes}",
        str(size),
        _of_paper(size, modalities, passes, _precision("bfloat16").dtype),
        settings={**_settings("kernels", size, "bfloat16", passes), "modalities": modalities},
    )


@every_length
@every_pass
def test_samples(compare_on_gpu: Compare, passes: str, steps: int) -> None:
    """Teams of 4 samples beside those of 8: twice as many, an exchange of half the bytes."""
    size = Size(steps, BATCH, HIDDEN)
    chosen = _precision("bfloat16")
    ours = _contenders(size, passes, chosen, SINGLE[:1])[0]
    contenders, errors = [], []
    for samples in ("4", "8"):
        name = f"teams of {samples}"
        cuda.SAMPLES = (samples,)
        errors.append(_check(size, chosen, name))
        contenders.append(Contender(name, _set("SAMPLES", samples, ours.call)))
    compare_on_gpu(
        f"Samples of a team, bfloat16, {passes}",
        str(size),
        contenders,
        error=max(errors),
        settings={
            **_settings("samples", size, "bfloat16", passes),
            "path": _path_of(contenders[0].call),
        },
        on_gpu=[x.name for x in contenders],
        missing={},
    )


@every_length
@every_pass
def test_packets(compare_on_gpu: Compare, passes: str, steps: int) -> None:
    """Packets of 16 bytes through L2 ("wide") beside those of 8."""
    _paths(compare_on_gpu, ("wide", "cooperative"), "packets", "Packets through L2", passes, steps)


@every_length
@every_pass
def test_stack(compare_on_gpu: Compare, passes: str, steps: int) -> None:
    """Both directions without context, in one call, beside one and beside what has a context."""
    size, form = Size(steps, BATCH, HIDDEN), StackForm(bidirectional=True)
    chosen = _precision("bfloat16")
    error = problems.check_stack(size, form, "cuda", GPU, 1, chosen.dtype, chosen.tolerance)
    contenders = problems.stack_contenders(size, form, passes, "cuda", GPU, chosen.dtype)
    compare_on_gpu(
        f"FusedMCUStack, both directions without context, bfloat16, {passes}",
        str(size),
        contenders,
        error=error,
        settings=_settings("stack", size, "bfloat16", passes),
        on_gpu=[x.name for x in contenders],
        missing={},
    )


@every_length
@every_pass
@pytest.mark.parametrize(("hidden", "batch"), OTHER_SIZES)
def test_size(compare_on_gpu: Compare, hidden: int, batch: int, passes: str, steps: int) -> None:
    size = Size(steps, batch, hidden)
    _sequence(compare_on_gpu, size, "bfloat16", passes, SINGLE)


@every_pass
def test_compiled_reference(compare_on_gpu: Compare, passes: str, compile_limit: int) -> None:
    """T is 64 alone: torch.compile unrolls the loop over the steps."""
    size = Size(LENGTHS[0], BATCH, HIDDEN)
    dtype = PRECISIONS["bfloat16"].dtype

    def compiled(name: str) -> Contender:
        torch.manual_seed(0)
        unit = reference.MCU(*[HIDDEN] * 3, device=GPU, dtype=dtype)
        operands = problems.sequence_operands(size, GPU, dtype)
        return contender(name, torch.compile(unit), operands, passes)

    rivals = {"compiled reference": compiled}
    title = "the compiled reference"
    _beside_compiled(compare_on_gpu, size, passes, rivals, title, "compiled", compile_limit)


@every_length
@every_pass
def test_flashrnn_compiled(
    compare_on_gpu: Compare, passes: str, steps: int, compile_limit: int
) -> None:
    """FlashRNN's GRU and LSTM of one head, compiled at their first call."""
    size = Size(steps, BATCH, HIDDEN)
    dtype = PRECISIONS["bfloat16"].dtype
    rivals = {
        f"FlashRNN {function.upper()}": partial(
            _flashrnn, function=function, gates=gates, size=size, dtype=dtype, passes=passes
        )
        for function, gates in (("gru", 3), ("lstm", 4))
    }
    title = "FlashRNN"
    _beside_compiled(compare_on_gpu, size, passes, rivals, title, "flashrnn", compile_limit)


def _beside_compiled(
    compare: Compare,
    size: Size,
    passes: str,
    rivals: dict[str, Callable[[str], Contender]],
    title: str,
    kind: str,
    limit: int,
) -> None:
    """FusedMCU beside contenders that their functions make, if they do so in `limit` seconds."""
    chosen = _precision("bfloat16")
    error = _check(size, chosen)
    contenders = _contenders(size, passes, chosen, SINGLE[:1])
    missing: dict[str, str] = {}
    for name, make in rivals.items():
        add_if_it_runs(contenders, missing, name, make, GPU, limit)
    compare(
        f"FusedMCU beside {title}, bfloat16, {passes}",
        str(size),
        contenders,
        error=error,
        settings=_settings(kind, size, "bfloat16", passes),
        on_gpu=[x.name for x in contenders],
        missing=missing,
    )


def _paths(
    compare: Compare, paths: Sequence[str], kind: str, title: str, passes: str, steps: int
) -> None:
    size = Size(steps, BATCH, HIDDEN)
    chosen = _precision("bfloat16")
    ours = _contenders(size, passes, chosen, SINGLE[:1])[0]
    allowed = cuda.PATHS
    contenders, errors, missing = [], [], {}
    for path in paths:
        reason = None if path in allowed else "MMIXER_CUDA_PATHS does not name it"
        if reason := reason or _no_kernel(path, size.hidden, chosen.dtype, passes):
            missing[path] = reason
            continue
        cuda.PATHS = (path,)
        errors.append(_check(size, chosen, path))
        contenders.append(Contender(path, _set("PATHS", path, ours.call)))
    if not contenders:
        pytest.skip(f"no path to measure: {missing}")
    compare(
        f"{title}, bfloat16, {passes}",
        str(size),
        contenders,
        error=max(errors),
        settings=_settings(kind, size, "bfloat16", passes),
        on_gpu=paths,
        missing=missing,
    )


def _sequence(
    compare: Compare,
    size: Size,
    precision: str,
    passes: str,
    names: Sequence[str],
) -> None:
    chosen = _precision(precision)
    error = _check(size, chosen)
    contenders = _contenders(size, passes, chosen, names)
    settings = _settings("sequence", size, precision, passes)
    compare(
        f"FusedMCU, {precision}, {passes}",
        str(size),
        contenders,
        error=error,
        settings={**settings, "path": _path_of(contenders[0].call)},
        on_gpu=SINGLE,
        missing={},
    )


def _precision(name: str) -> Precision:
    chosen = PRECISIONS[name]
    torch.set_float32_matmul_precision(chosen.matmul)
    return chosen


def _check(size: Size, precision: Precision, variant: str = "") -> float:
    """AssertionError where the engine is wrong: then nothing is timed."""
    dtype, matmul, tolerance = precision
    return problems.check_sequence(size, "cuda", GPU, 1, dtype, tolerance, f"{variant} {matmul}")


def _contenders(
    size: Size, passes: str, precision: Precision, names: Sequence[str]
) -> list[Contender]:
    every = problems.sequence_contenders(size, passes, "cuda", GPU, precision.dtype)
    return [x for x in every if x.name in names]


def _settings(kind: str, size: Size, precision: str, passes: str) -> dict[str, Any]:
    return {"kind": kind, **size._asdict(), "precision": precision, "passes": passes}


def _no_kernel(path: str, hidden: int, dtype: torch.dtype, passes: str) -> str | None:
    if path == "step":
        return None
    device = torch.cuda.current_device()
    for backward in (False, True)[: 1 + (passes != "forward")]:
        plans, refusal = cuda.persistent_plans(device, path, hidden, dtype, backward)
        if not plans:
            return refusal
    return None


def _set(name: str, value: str, call: Callable[[], object]) -> Callable[[], None]:
    """A call with one choice of the engine's."""

    def run() -> None:
        setattr(cuda, name, (value,))
        call()

    return run


def _context_size(modalities: int) -> int:
    return max(modalities - 1, 1) * HIDDEN


def _of_paper(size: Size, modalities: int, passes: str, dtype: torch.dtype) -> list[Contender]:
    """One call of ours for all modalities, and a call for each of cuDNN's."""
    group = Group.random(size, modalities, GPU, dtype, _context_size(modalities))
    contenders = [_grouped("mcu_group", group, passes)]
    for name, layer in BASELINES.items():
        layers = Layers(layer(HIDDEN, HIDDEN, device=GPU, dtype=dtype) for _ in range(modalities))
        contenders.append(contender(name, layers, group.inputs, passes))
    return contenders


def _grouped(name: str, group: Group, passes: str) -> Contender:
    operands = list(group.operands().values())

    def function(*_: Tensor) -> Tensor:
        return functional.mcu_group(*group, engine="cuda")[0]

    return contender(name, function, operands, passes)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _path_of(call: Callable[[], object]) -> str:
    """The path that the engine's log names for a call, or those of forward and backward."""
    logger, handler = logging.getLogger(cuda.__name__), _Messages()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        call()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    found = [re.search(r"path (\w+)", message) for message in handler.messages]
    return ", ".join(dict.fromkeys(match[1] for match in found if match)) or "unknown"


def _flashrnn(
    name: str, function: str, gates: int, size: Size, dtype: torch.dtype, passes: str
) -> Contender:
    from flashrnn import flashrnn

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=GPU, dtype=dtype, requires_grad=True)

    steps, batch, hidden = size
    biases = 4  # also the GRU's: its candidate has two
    operands = (
        randn(batch, steps, gates, 1, hidden),
        randn(gates, 1, hidden, hidden),
        randn(biases, 1, hidden),
    )

    def module(*operands: Tensor) -> Tensor:
        output: Tensor = flashrnn(*operands, function=function, dtype=str(dtype)[6:])[0]
        return output

    return contender(name, module, operands, passes)
