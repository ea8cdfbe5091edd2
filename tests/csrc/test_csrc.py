"""The C++ and CUDA code by itself: under sanitizers, and the error bounds of its functions."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
from building import build, build_directory, call, expect_success, launcher


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_engine(tmp_path: Path, sanitize: str) -> None:
    words = launcher(tmp_path, sanitize)
    build(tmp_path / "build", "test_engine", sanitize=sanitize)
    expect_success([*words, tmp_path / "build" / "test_engine"])


@pytest.fixture(scope="module")
def cuda_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_directory(tmp_path_factory.mktemp("emulated"))
    build(directory, "test_emulator", "test_cuda")
    return directory


def test_emulator(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_emulator"]))


def test_every_synchronisation_of_the_cuda_kernels_is_needed(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_cuda"]))


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


def test_cuda_kernels_under_thread_sanitizer(cuda_tests: Path, tmp_path: Path) -> None:
    words = launcher(tmp_path, "thread")
    build(tmp_path / "build", "test_cuda", sanitize="thread")
    program = tmp_path / "build" / "test_cuda"
    sites = re.findall(r"without (\S+ block_sync):", expect_success([cuda_tests / "test_cuda"]))
    for kernel, file in CUDA_KERNELS.items():
        expect_success([*words, program, kernel])
        site = next(site for site in sites if site.startswith(file))
        result = call([*words, program, kernel, site])
        assert "data race" in result.stdout, f"{kernel} without {site}\n{result.stdout[-3000:]}"


@pytest.fixture(scope="module")
def vector_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vector")
    build(directory, "test_vector")
    return directory


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
