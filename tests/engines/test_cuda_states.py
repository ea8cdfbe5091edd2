"""The CUDA engine's words on a machine and its work on a GPU's streams, over stubs: no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from building import build, expect_success, find

from mmixer_kernels import engines
from mmixer_kernels.engines import choose, cuda
from mmixer_kernels.engines.protocol import EngineState

Machine = Callable[..., list[int]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """machine(*GPUs, current=0): each a refusal of the extension, "" for none.

    Returns the indices of the GPUs that the extension has been asked about, in order.
    """

    def build(*refusals: str, current: int = 0, capability: tuple[int, int] = (9, 0)) -> list[int]:
        asked: list[int] = []
        native = SimpleNamespace(refusal=lambda: refusals[asked[-1]])
        monkeypatch.setattr(cuda, "_native", native)
        monkeypatch.setattr(
            cuda, "_extension", SimpleNamespace(build_info=lambda: {"cuda": "made up"})
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(refusals))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(
            torch.cuda, "device", lambda index: (asked.append(index), nullcontext())[1]
        )
        cuda._refusal.cache_clear()
        return asked

    yield build
    cuda._refusal.cache_clear()


DRIVER = "its driver serves CUDA 12.8 at most, but this build is of CUDA 13.0: update the driver"


def test_states_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    state = engines()["cuda"]
    assert state.available == (cuda._native is not None and torch.cuda.is_available())
    monkeypatch.setattr(cuda, "_native", None)
    assert "this build has no CUDA" in cuda.state().reason


def test_available_means_that_a_kernel_can_run(machine: Machine) -> None:
    machine("")
    assert engines()["cuda"] == EngineState(True, "CUDA, made up")
    machine(DRIVER)
    assert engines()["cuda"] == EngineState(False, f"cuda:0: {DRIVER}")
    machine("", capability=(7, 5))
    assert "its compute capability is 7.5, not 8.0 or newer" in engines()["cuda"].reason


def test_the_current_gpu_is_asked_first_and_others_only_where_it_cannot(machine: Machine) -> None:
    asked = machine("", "", "", current=1)
    assert cuda.state().available
    assert asked == [1]
    asked = machine("", "no image", "no image", current=2)
    assert cuda.state().available
    assert asked == [2, 0]
    asked = machine("one", "two")
    assert cuda.state().reason == "cuda:0: one; cuda:1: two"


def test_an_error_that_may_pass_is_no_answer_for_ever(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("")
    asked = []

    def refusal() -> str:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("cudaFuncGetAttributes: out of memory")
        return ""

    monkeypatch.setattr(cuda._native, "refusal", refusal)
    state = engines()["cuda"]
    assert state.reason == "cuda:0: cudaFuncGetAttributes: out of memory"
    assert isinstance(state.error, RuntimeError)
    for _ in range(2):
        assert engines()["cuda"].available
    assert len(asked) == 2


def test_a_call_asks_about_its_own_gpu(machine: Machine) -> None:
    asked = machine("no image", "")
    on = [SimpleNamespace(device=torch.device("cuda", index)) for index in range(2)]
    assert choose("cuda", on[1]) == "cuda"
    assert choose("auto", on[1]) == "cuda"
    assert asked == [1]
    with pytest.raises(RuntimeError, match='engine="cuda" cannot run here: cuda:0: no image'):
        choose("cuda", on[0])


def test_torch_compile_takes_the_answer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the extension's own, which torch.compile cannot look into."""
    if cuda._native is None:
        pytest.skip("this build has no CUDA")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    cuda._refusal.cache_clear()

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cuda._state_of(0).available else x - 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == (1 if torch.cuda.is_available() else -1)
    cuda._refusal.cache_clear()


def printed(script: str, *words: object, **environment: str) -> list[str]:
    """The lines that a Python of its own prints."""
    command = [sys.executable, "-c", script, *map(str, words)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


RELOADED = """
import importlib, os, sys
from mmixer_kernels.engines import cuda
for value in sys.argv[2:]:
    os.environ[sys.argv[1]] = value
    cuda = importlib.reload(cuda)
    print(cuda.PATHS, cuda.SAMPLES, cuda.state().reason)
"""


def reloaded(variable: str, *values: str) -> list[str]:
    """The engine's words on itself with each value of an environment variable."""
    if cuda._native is None:
        pytest.skip("this build has no CUDA")
    return printed(RELOADED, variable, *values)


def test_the_environment_leaves_paths_out() -> None:
    every = "cell, cluster, cooperative, wide, step"
    answers = {
        "cooperative,step": "('cooperative', 'step')",
        "wide": "('wide',)",
        "clusters,step": f"must name some of {every}, separated by commas",
        "cluster,": "but names ''",
        "": "('cell', 'cluster', 'cooperative', 'step')",
    }
    lines = reloaded("MMIXER_CUDA_PATHS", *answers)
    for answer, line in zip(answers.values(), lines, strict=True):
        assert answer in line


def test_the_environment_chooses_the_samples_of_a_team() -> None:
    answers = {
        "8": "('8',)",
        "8,4": "('8', '4')",
        "16": "MMIXER_CUDA_SAMPLES must name some of 4, 8, separated by commas, but names '16'",
        "": "('4', '8')",
    }
    lines = reloaded("MMIXER_CUDA_SAMPLES", *answers)
    for answer, line in zip(answers.values(), lines, strict=True):
        assert answer in line


@pytest.fixture
def extension() -> str:
    """The path of this package's extension, which must have been built with CUDA."""
    if cuda._native is None:
        pytest.skip("this build has no CUDA")
    return str(cuda._extension.__file__)


IMPORTED = """
import sys, torch
if "cpu" in sys.argv:
    torch.version.cuda = None
from mmixer_kernels import FusedMCU, _native, engines
FusedMCU(2, 3, 4, engine="cpu")(torch.zeros(1, 1, 2), torch.zeros(1, 3))
print(engines()["cuda"].reason)
print(_native.cuda.refusal())
"""


@pytest.mark.parametrize("driver", ["unreadable", "without functions"])
def test_without_a_driver(extension: str, driver: str, tmp_path: Path) -> None:
    """The extension is there all the same, and the engine says why it is off."""
    library = tmp_path / "libcuda.so.1"
    library.write_text("no library")
    if driver != "unreadable":
        source = tmp_path / "empty.c"
        source.write_text("")
        expect_success([find("cc", "gcc", "clang"), "-shared", source, "-o", library])
    path = os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")])
    state, refusal = printed(IMPORTED, LD_LIBRARY_PATH=path.rstrip(os.pathsep))
    assert state == "torch finds no CUDA device or driver"
    assert refusal == "there is no NVIDIA driver"


def test_without_torchs_cuda(extension: str) -> None:
    assert printed(IMPORTED, "cpu")[0] == "this torch has no CUDA: install one that has"


ALONE = """
import ctypes, importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_native", sys.argv[1])
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
loader.exec_module(native)
for library in sys.argv[2:]:
    ctypes.CDLL(library)
print("torch" in sys.modules, native.cuda.product_library())
"""
"""Loads the extension, and then libraries, in a process that has no torch."""


@pytest.mark.parametrize("major", [11, 12, 99])
def test_cublaslt_of_another_major_number(extension: str, major: int, tmp_path: Path) -> None:
    """The one that is loaded is taken; the stub calls itself 12.13.14."""
    built = build("cublaslt_stub") / "libcublaslt_stub.so"
    stub = shutil.copy(built, tmp_path / f"libcublasLt.so.{major}")
    assert printed(ALONE, extension, stub) == ["False cuBLASLt 12.13.14"]


def test_without_cublaslt(extension: str) -> None:
    assert printed(ALONE, extension) == ["False own kernel: no libcublasLt is loaded"]


def test_cublaslt_is_the_one_that_torch_has_loaded(extension: str) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    major = torch.version.cuda.split(".")[0]
    assert cuda._native.product_library().startswith(f"cuBLASLt {major}.")
