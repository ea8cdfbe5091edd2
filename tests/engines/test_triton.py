"""The triton engine against the float64 reference: its kernels on the GPU or, where there is none,
by Triton's interpreter on this CPU; and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch
from contract import OPTIONS, PRECISIONS, Contract, Options
from helpers import (
    Size,
    op_operands,
    problem,
    reference_results,
    relative_errors,
    with_gradients,
)

from mmixer_kernels.engines import triton as engine
from mmixer_kernels.engines import triton_tuning
from mmixer_kernels.engines.protocol import EngineState
from mmixer_kernels.engines.triton_tuning import Configuration
from mmixer_kernels.functional import mcu_cell
from mmixer_kernels.problem import Problem

triton = pytest.importorskip("triton")
from mmixer_kernels.engines import triton_pass  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
run = partial(helpers.run, "triton")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine takes CPU tensors where there is no GPU, by Triton's interpreter
    (tests/conftest.py). The tiles are so small that every size has several."""
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(engine, "state", lambda device=None: EngineState(True, "interpreted"))
        monkeypatch.setattr(engine, "DEVICES", ("cpu", "cuda"))
    p = problem(Size(1, 1, 1, 1, 2), dtype=torch.float32).on(DEVICE)
    try:
        with torch.no_grad():
            run()(p.input, p.context, p.weights, p.hx, None)
    except Exception as error:
        if "0-dimensional arrays" in repr(error):
            pytest.skip("this triton's interpreter does not go with this numpy")
        raise
    with triton_tuning.forced(Configuration(16, 16, 4, 2)):
        yield


@pytest.mark.usefixtures("runs")
class TestContract(Contract):
    """The interpreter takes about a second per call: options and sizes are fewer."""

    ENGINE = "triton"
    DEVICE = DEVICE
    SIZE = Size(3, 2, 4, 5, 13)  # one tile, where those of the errors have several
    SIZES = (Size(1, 1, 1, 1, 1), Size(2, 5, 7, 9, 33))
    EXACT_SIZES = ()
    test_error_is_no_larger_than_eager_pytorch = None  # type: ignore[assignment]

    def options_of(self, precision: str) -> Sequence[Options]:
        return [OPTIONS[i] for i in ((0, 2, 3, 6, 7) if precision == "float64" else (1, 6))]


@pytest.mark.usefixtures("runs")
def test_opcheck_of_backward() -> None:
    if DEVICE == "cuda":
        pytest.skip("operands of this test are on a CPU")
    arguments, grads = op_operands(groups=2)
    forward = torch.ops.mmixer_kernels.mcu_forward.default
    backward = torch.ops.mmixer_kernels.mcu_backward.default
    options = "triton", "gates"
    _, _, saved = forward(*arguments, *options)
    call = (*grads, saved.detach(), *arguments, *options, True, True)
    torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels that the test launches, and their grids."""
    launched = []
    kernels = triton_pass.triton_kernels

    class Recording:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append((self.name, grid))
            return getattr(kernels, self.name)[grid]

    recording = SimpleNamespace(**{name: Recording(name) for name in kernels.__all__})
    monkeypatch.setattr(triton_pass, "triton_kernels", recording)
    return launched


@pytest.mark.usefixtures("runs")
def test_both_directions_without_context_launch_nothing_of_it(launched: list[Any]) -> None:
    p = problem(Size(3, 18, 5, 0, 20), bidirectional=True, dtype=torch.float32).on(DEVICE)
    names = "norm_tanh products recurrence"
    with torch.no_grad():
        run()(p.input, None, (p.weights, p.weights_reverse), p.hx, None)
    assert [name for name, _ in launched] == names.split()
    assert launched[-1] == ("recurrence", (2, 2))
    launched.clear()
    with_gradients(run(), p)
    names += (
        " norm_tanh products products reset_gate products update_gate recurrence_backward"
        " norm_tanh_backward"
    )
    assert [name for name, _ in launched] == names.split()


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [7, 0])
def test_step_is_one_launch(launched: list[Any], context: int, dtype: torch.dtype) -> None:
    p = problem(Size(1, 18, 9, context, 33), dtype=dtype)
    with torch.no_grad():
        q = p.on(DEVICE)
        output = mcu_cell(q.input[0], q.context, q.weights, q.hx, engine="triton")
    assert launched == [("step", (2,))]
    errors = relative_errors({"h_n": output.unsqueeze(0)}, reference_results(p))
    floors = {precision.dtype: precision.floor for precision in PRECISIONS.values()}
    assert errors["h_n"] < floors[dtype]


@pytest.mark.usefixtures("runs")
def test_step_reads_strided_rows_and_bfloat16_weights() -> None:
    p = problem(Size(1, 3, 9, 7, 20), dtype=torch.float32).on(DEVICE)
    weights = p.weights.map(torch.Tensor.bfloat16)
    wide = torch.full((3, 2, 9), torch.nan, device=DEVICE)
    wide[:, 0] = p.input[0]
    with torch.no_grad():
        output = mcu_cell(wide[:, 0], p.context, weights, p.hx, engine="triton")
        truth = mcu_cell(p.input[0], p.context, weights, p.hx, engine="reference")
    torch.testing.assert_close(output, truth, rtol=2e-6, atol=2e-6)


def test_weights_of_a_call_are_not_copied() -> None:
    problems = [problem(Size(2, 3, 4, 6, 19)) for _ in range(3)]
    this = triton_pass.Pass(
        Problem(
            [p.input for p in problems],
            [p.context for p in problems],
            [p.weights for p in problems],
        )
    )
    for g, p in enumerate(problems):
        own = [p.weights.weight_r, p.weights.weight_z, p.weights.weight_h]
        ours = this.recurrent[3 * g : 3 * g + 3]
        assert [x.data_ptr() for x in ours] == [x.data_ptr() for x in own]


class _OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_products_of_narrow_operands(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm refuses out_dtype: there operands are widened first."""
    narrow = []

    def mm(a: Any, b: Any, out_dtype: torch.dtype) -> torch.Tensor:
        narrow.append(out_dtype)
        return a.as_subclass(torch.Tensor).to(out_dtype) @ b.as_subclass(torch.Tensor).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.version, "hip", hip)
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    result = triton_pass.product(a.as_subclass(_OnGPU), b.as_subclass(_OnGPU))
    assert narrow == ([torch.float32] if hip is None else [])
    assert torch.equal(torch.Tensor(result), a.float() @ b.float())


def compile_in_a_process(*words: object) -> list[list[str]]:
    script = Path(__file__).with_name("compile_triton.py")
    result = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtypes"),
    [("80", ["bf16", "fp32"]), ("90", ["bf16", "fp32", "fp64"]), ("gfx942", ["bf16", "fp32"])],
)
def test_default_configurations_do_not_spill(target: str, dtypes: list[str]) -> None:
    """The hidden size does not matter: kernels with products work on a fixed number of columns."""
    lines = compile_in_a_process(target, "resources", *dtypes)
    assert len(lines) == 4 * len(dtypes)
    for name, dtype, registers, stack, shared in lines:
        assert int(registers) <= 255, (name, dtype)
        assert int(stack) == 0, (name, dtype)
        assert int(shared) <= (64 if target == "gfx942" else 99) * 1024, (name, dtype)


@pytest.mark.slow
def test_every_kernel_compiles_with_and_without_its_options() -> None:
    """Types are checked there; the interpreter does not look at them."""
    assert compile_in_a_process(90, "all") == [["40"]]


def test_states(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.state().available == torch.cuda.is_available()
    engine._state.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engine.state().reason == "triton is not installed: pip install triton"
    engine._state.cache_clear()
