"""The engine that takes a case, and what slows it of the machine and its settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmixer_kernels.comparison import machine
from mmixer_kernels.comparison.case import Case
from mmixer_kernels.engines import cpu
from mmixer_kernels.engines.protocol import EngineState

CASE = Case(2, 1, 8)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMIXER_ENGINE", *machine.SLOWING):
        monkeypatch.delenv(name, raising=False)


def test_the_engine_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.facts(CASE)
    assert (facts["name"], facts["why"]) == ("cpu", "the first in auto's order that runs on cpu")
    assert facts["others"]["reference"] == "runs here, and is behind it in auto's order"
    assert facts["others"]["cuda"] == "takes no tensors on cpu"
    assert machine.faster_engine(CASE) is None
    assert machine.facts(Case(2, 1, 8, engine="reference"))["why"] == "asked for by name"
    monkeypatch.setenv("MMIXER_ENGINE", "reference")
    facts = machine.facts(CASE)
    assert facts["why"] == "MMIXER_ENGINE=reference asks for it"
    assert facts["others"]["cpu"] == "runs here, and is before it in auto's order"
    assert machine.faster_engine(CASE) == "cpu"


def test_an_engine_that_is_off_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.settings(CASE) == []
    monkeypatch.setattr(cpu, "_state", EngineState(False, "no such file"))
    with pytest.warns(RuntimeWarning, match="falling back"):
        facts = machine.facts(CASE)
    assert facts["name"] == "reference"
    assert facts["others"]["cpu"] == "off: no such file"
    assert machine.faster_engine(CASE) is None
    assert machine.settings(CASE) == ['the engine "cpu", which auto prefers, is off: no such file']


def test_a_setting_is_told_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert machine.settings(CASE) == []
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(machine, "_engine", lambda case: machine.of_device(case.device)[0])
    assert machine.settings(on_gpu) == [  # type: ignore[arg-type]
        "CUDA_LAUNCH_BLOCKING=1 is set: the host waits for every kernel"
    ]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (note,) = machine.settings(CASE)
    assert note.startswith("OMP_WAIT_POLICY=passive is set")


def test_a_build_that_is_slow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {
        "openmp": False,
        "build_type": "Debug",
        "instruction_sets_here": ["avx2", "baseline"],
        "instruction_set": "baseline",
    }
    native = SimpleNamespace(build_info=lambda: build)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: native)
    told = " ".join(machine._of_build())
    assert all(x in told for x in ("OpenMP", "debugging", "uses baseline, though avx2"))
    build |= {"openmp": True, "build_type": "Release", "instruction_set": "avx2"}
    assert machine._of_build() == []


def test_caches_are_read_where_linux_tells_them(tmp_path: Path) -> None:
    for index, facts in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), facts, strict=True):
            (folder / name).write_text(value + "\n")
    assert machine.caches(tmp_path) == {"L1": 48 * 2**10, "L2": 2 * 2**20}
    assert machine.caches(tmp_path / "not there") == {}


def test_the_memories_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda")
    assert machine.memories(gpu) == {"shared memory of all SMs": 132 * 233472}
    properties.L2_cache_size = 50 * 2**20
    assert machine.memories(gpu)["L2"] == 50 * 2**20


def test_who_set_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert "torch.set_num_threads" in machine.threads_are_set_by()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.threads_are_set_by() == "OMP_NUM_THREADS=1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # --threads 1 has said otherwise since
    assert "OMP" not in machine.threads_are_set_by()
