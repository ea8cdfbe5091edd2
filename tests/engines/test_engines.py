"""Choosing an engine."""

import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from contract import Contract

from mmixer_kernels import FusedMCU, engines
from mmixer_kernels.engines import choose, cuda, names, triton
from mmixer_kernels.engines.protocol import EngineState


class TestReference(Contract):
    ENGINE = "reference"


def test_engines_tells_each_state_and_reason():
    states = engines()
    assert list(states) == list(names())
    assert states["reference"].available
    assert states["cpu"].available
    if cuda._native is None or not torch.cuda.is_available():
        assert not states["cuda"].available
    assert states["triton"].available == (
        torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    )
    assert all(state.reason for state in states.values())


def test_auto_takes_the_device_s_engine():
    assert choose("auto", torch.zeros(1)) == "cpu"
    assert choose("auto", torch.zeros(1, device="meta")) == "reference"


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("MMIXER_ENGINE", "reference")
    assert choose("auto", torch.zeros(1)) == "reference"
    assert choose("cpu", torch.zeros(1)) == "cpu"
    monkeypatch.setenv("MMIXER_ENGINE", "fast")
    with pytest.raises(ValueError, match=r"MMIXER_ENGINE must be one of auto, .* but is 'fast'"):
        choose("auto", torch.zeros(1))
    monkeypatch.setenv("MMIXER_ENGINE", "cuda")
    with pytest.raises(ValueError, match='MMIXER_ENGINE="cuda" does not take this call'):
        choose("auto", torch.zeros(1))


def test_an_engine_asked_for_is_used_or_raises():
    with pytest.raises((RuntimeError, ValueError), match='engine="triton"'):
        choose("triton", torch.zeros(1))
    with pytest.raises(ValueError, match="takes tensors on cpu, but input is on meta"):
        choose("cpu", torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="engine must be one of"):
        FusedMCU(2, 2, 2, engine="fast")


def test_auto_says_why_it_does_not_take_the_native_engine(monkeypatch):
    # The package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["mmixer_kernels.engines"], "_warned", set())
    monkeypatch.setattr(cuda, "state", lambda device: EngineState(False, "this build has no CUDA"))
    monkeypatch.setattr(
        triton, "state", lambda device: EngineState(False, "triton is not installed")
    )
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.warns(
        RuntimeWarning, match="here: cuda: this build has no CUDA; triton: triton is not"
    ):
        assert choose("auto", on_gpu) == "reference"
    monkeypatch.setattr(triton, "state", lambda device: EngineState(True, "made up"))
    with pytest.warns(
        RuntimeWarning, match='engine="triton", as others do not run here: cuda: this'
    ):
        assert choose("auto", on_gpu) == "triton"
    monkeypatch.setattr(sys.modules["mmixer_kernels.engines"], "_warned", set())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("auto", on_gpu) == "triton"  # no warning: there is no cuda engine to miss
    monkeypatch.setattr(cuda, "state", lambda device: EngineState(True, "made up"))
    assert choose("auto", on_gpu) == "cuda"


def test_an_import_brings_no_compiler():
    """torch._dynamo takes as long as torch itself."""
    names = ("torch._dynamo", "torch.onnx", "onnx", "onnxscript", "triton")
    script = f"import sys, mmixer_kernels; print([x for x in {names} if x in sys.modules])"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


_WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["mmixer_kernels._native"] = None
import torch
from mmixer_kernels import FusedMCU, engines
print(engines()["cpu"].reason)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    unit = FusedMCU(2, 3, 4)
    for _ in range(2):
        unit(torch.zeros(1, 1, 2), torch.zeros(1, 3))
print(len([w for w in caught if "falling back" in str(w.message)]), caught[0].message)
try:
    FusedMCU(2, 3, 4, engine="cpu")(torch.zeros(1, 1, 2), torch.zeros(1, 3))
except RuntimeError as error:
    print(type(error.__cause__).__name__, error)
"""


def test_without_the_extension():
    """auto falls back with one warning that carries the error, "cpu" raises with it."""
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTENSION], capture_output=True, text=True, check=True
    )
    reason, warning, raised = result.stdout.strip().splitlines()
    assert "_native cannot load" in reason
    assert warning.startswith("1 falling back")
    assert "_native" in warning
    assert raised.startswith("ModuleNotFoundError")
    assert "_native" in raised
