"""The C++ and CUDA code by itself: under sanitizers, and the error bounds of its functions."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from building import ROOT, build, call, expect_success, find, launcher


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_engine(tmp_path: Path, sanitize: str) -> None:
    words = launcher(tmp_path, sanitize)
    directory = build("test_engine", sanitize=sanitize)
    expect_success([*words, directory / "test_engine"])


@pytest.fixture(scope="module")
def cuda_tests() -> Path:
    return build("test_emulator", "test_cuda")


def test_emulator(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_emulator"]))


def test_every_synchronisation_of_the_cuda_kernels_is_needed(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_cuda"]))


def test_launches_and_what_a_device_refuses(tmp_path: Path) -> None:
    """Over a stub of the CUDA runtime: no GPU is needed, but nvcc is."""
    nvcc, program = find("nvcc"), tmp_path / "test_launch"
    sources = [ROOT / "tests" / "csrc" / name for name in ("test_launch.cu", "runtime_stub.cpp")]
    flags = [
        "-std=c++17",
        "-cudart",
        "none",
        "--gpu-architecture=sm_90",
        "-Xcompiler=-Wall,-Wextra",
    ]
    assert not re.search("warning|error", expect_success([nvcc, *flags, *sources, "-o", program]))
    print(expect_success([program]))


PROBE_KERNEL = ("kernels", "cluster", "forward", "128", "1")


@pytest.fixture(scope="module")
def probe() -> Path:
    """benchmarks/gpu_probe.cu, its kernels run by the emulator and its runtime a stub."""
    return build("emulated_probe") / "emulated_probe"


def probed(probe: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    result = call([probe, *words])
    assert result.returncode == status, result.stdout
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["cluster", "cooperative"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_probe_of_a_kernel(probe: Path, path: str, direction: str) -> None:
    """The kernels agree with the probe's own float64, and 20 runs with each other."""
    (record,) = probed(probe, "kernels", path, direction, "128", "2")
    assert record["kind"] == "kernel"
    assert (record["path"], record["direction"], record["hidden"]) == (path, direction, 128)
    assert record["not_finite"] == record["differ"] == 0
    assert record.get("error", 1e-6) < 2e-5


@pytest.mark.slow
def test_probe_of_network_and_cell(probe: Path) -> None:
    records = probed(probe, "network")
    assert {record["kind"] for record in records} == {"l2", "exchange"}
    assert {record["what"] for record in records} == {"one-way", "statistics", "all-gather"}
    assert len({record["wait"] for record in records if "wait" in record}) == 3
    (last,) = probed(probe, "once", "cell")
    assert last == {"kind": "once", "path": "cell", "count": 1}


@pytest.mark.slow
def test_probe_tells_what_it_has_seen_by_its_exit_status(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", "hang")
    (hang,) = probed(probe, *PROBE_KERNEL, status=3)
    assert hang == {
        "kind": "hang",
        **{"path": "cluster", "direction": "forward", "hidden": 128, "parts": 1},
    }
    monkeypatch.setenv("STUB", "differ")
    (differ,) = probed(probe, *PROBE_KERNEL, status=1)
    assert differ["differ"] > 0
    monkeypatch.setenv("STUB", "missing")
    (error,) = probed(probe, "facts", status=2)
    assert "an error of the stub" in error["what"]
    (error,) = probed(probe, "kernels", "clusters", "forward", status=2)
    assert error["what"] == "PATH must be cluster or cooperative, but is clusters"


CUDA_KERNELS = {
    "forward_cluster": "forward.h",
    "forward_cooperative": "forward.h",
    "backward_cluster": "backward.h",
    "backward_cooperative": "exchange.h",
    "prepare": "prepare.h",
    "row_wise": "rows.h",
    "cell": "cell.h",
}
"""Each, and a file of which it must not lose a block_sync."""


@pytest.mark.slow
def test_cuda_kernels_under_thread_sanitizer(cuda_tests: Path, tmp_path: Path) -> None:
    words = launcher(tmp_path, "thread")
    program = build("test_cuda", sanitize="thread") / "test_cuda"
    sites = re.findall(r"without (\S+ block_sync):", expect_success([cuda_tests / "test_cuda"]))
    for kernel, file in CUDA_KERNELS.items():
        expect_success([*words, program, kernel])
        site = next(site for site in sites if site.startswith(file))
        result = call([*words, program, kernel, site])
        assert "data race" in result.stdout, f"{kernel} without {site}\n{result.stdout[-3000:]}"


@pytest.fixture(scope="module")
def vector_tests() -> Path:
    return build("test_vector")


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_vector(vector_tests: Path, instruction_set: str) -> None:
    program = vector_tests / f"test_vector_{instruction_set}"
    if not program.exists():
        pytest.skip(f"{platform.machine()} has no {instruction_set}")
    result = call([program])
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout
    print(result.stdout)
