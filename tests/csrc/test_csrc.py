"""The C++ and CUDA code by itself: programs of its own, under sanitizers too, and gpu_probe."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from building import ROOT, build, call, expect_success, find, launcher


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_engine(tmp_path: Path, sanitize: str) -> None:
    words = launcher(tmp_path, sanitize)
    directory = build("test_engine", "test_int8", "test_team", sanitize=sanitize)
    for program in ("test_engine", "test_int8", "test_team"):
        expect_success([*words, directory / program])


def test_team() -> None:
    print(expect_success([build("test_team") / "test_team"]))


def test_int8() -> None:
    print(expect_success([build("test_int8") / "test_int8"]))


@pytest.fixture(scope="module")
def cuda_tests() -> Path:
    return build("test_emulator", "test_cuda")


def test_emulator(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_emulator"]))


def test_every_synchronisation_of_the_cuda_kernels_is_needed(cuda_tests: Path) -> None:
    print(expect_success([cuda_tests / "test_cuda"]))


def compile_over_runtime_stub(directory: Path, *sources: str) -> Path:
    """Such a program needs nvcc, but no GPU."""
    nvcc, program = find("nvcc"), directory / "program"
    flags = ["-std=c++17", "-cudart", "none", "--gpu-architecture=sm_90", "-ldl"]
    files = [ROOT / source for source in (*sources, "tests/csrc/runtime_stub.cpp")]
    words = [nvcc, *flags, "-Xcompiler=-Wall,-Wextra", *files, "-o", program]
    assert not re.search("warning|error", expect_success(words))
    return program


def test_launches_and_what_a_device_refuses(tmp_path: Path) -> None:
    program = compile_over_runtime_stub(tmp_path, "tests/csrc/test_launch.cu")
    print(expect_success([program]))


RUNTIME_FUNCTIONS = {
    *("DeviceGetAttribute", "DriverGetVersion", "FuncGetAttributes", "FuncSetAttribute"),
    *("GetDevice", "GetErrorString", "GetLastError", "LaunchKernelEx", "MemsetAsync"),
    *("OccupancyMaxActiveBlocksPerMultiprocessor", "OccupancyMaxActiveClusters"),
    *("RuntimeGetVersion", "StreamGetId", "ThreadExchangeStreamCaptureMode"),
}
"""None of them synchronises, takes memory, makes a stream or chooses a device."""


def test_the_engine_calls_no_other_function_of_the_runtime() -> None:
    folders = ROOT / "csrc" / "cuda", ROOT / "python"
    sources = "".join(file.read_text() for folder in folders for file in folder.iterdir())
    assert {*re.findall(r"\bcuda([A-Z]\w*)\(", sources)} == RUNTIME_FUNCTIONS


def test_products() -> None:
    print(expect_success([build("test_products") / "test_products"]))


@pytest.fixture(scope="module")
def cublaslt() -> Path:
    """test_cublaslt and the stubs of the library."""
    if platform.system() != "Linux":
        pytest.skip("cuBLASLt is found by Linux's loader")
    return build("test_cublaslt", "cublaslt_stub", "cublaslt_stub_without_heuristic")


def library(directory: Path, name: str, built: Path) -> Path:
    return Path(shutil.copy(built, directory / name))


@pytest.mark.parametrize("name", ["libcublasLt.so.12", "libcublasLt.so.99.1", "libcublasLt.so"])
def test_cublaslt_is_found_whatever_its_version(cublaslt: Path, tmp_path: Path, name: str) -> None:
    stub = library(tmp_path, name, cublaslt / "libcublaslt_stub.so")
    print(expect_success([cublaslt / "test_cublaslt", stub]))


def test_cublaslt_inside_another_library(cublaslt: Path, tmp_path: Path) -> None:
    """Its symbols are found where they are global."""
    stub = library(tmp_path, "libtorch_cuda.so", cublaslt / "libcublaslt_stub.so")
    print(expect_success([cublaslt / "test_cublaslt", stub, "global"]))
    refusal = expect_success([cublaslt / "test_cublaslt", stub, "refusal"])
    assert refusal == "no libcublasLt is loaded\n"


def test_without_cublaslt(cublaslt: Path, tmp_path: Path) -> None:
    assert expect_success([cublaslt / "test_cublaslt"]) == "no libcublasLt is loaded\n"
    built = cublaslt / "libcublaslt_stub_without_heuristic.so"
    stub = library(tmp_path, "libcublasLt.so.13", built)
    refusal = expect_success([cublaslt / "test_cublaslt", stub, "refusal"])
    assert refusal == f"{stub} has no cublasLtMatmulAlgoGetHeuristic\n"


def nvidia(pattern: str) -> Path:
    """A file of NVIDIA's packages for Python, which PyTorch's CUDA builds depend on."""
    for file in sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/{pattern}")):
        return file
    pytest.skip(f"there is no nvidia/{pattern}")


def test_pytorchs_cublaslt(cublaslt: Path) -> None:
    """The library has the functions and takes the descriptions. Without a GPU it ends there."""
    real = nvidia("*/lib/libcublasLt.so.*")
    version, error = expect_success([cublaslt / "test_cublaslt", real, "device"]).splitlines()
    assert version.split(".")[0] == real.suffix.removeprefix(".")
    assert error.startswith("cublasLtCreate failed with status") or error == "no error"


def test_declarations_of_cublaslt(tmp_path: Path) -> None:
    """They are compared at compile time with those of NVIDIA's header."""
    nvcc, include = find("nvcc"), nvidia("*/include/cublasLt.h").parent
    source = ROOT / "tests" / "csrc" / "cublaslt_header.cpp"
    compile_only = ["-std=c++17", "-I", include, "-c", source, "-o", tmp_path / "header.o"]
    print(expect_success([nvcc, *compile_only]))


def test_choice_between_cublaslt_and_the_own_kernel(cublaslt: Path, tmp_path: Path) -> None:
    """The test runs over stubs of the CUDA runtime and of cuBLASLt."""
    sources = ("tests/csrc/test_multiply.cu", "csrc/cuda/products.cu", "csrc/cuda/cublaslt.cpp")
    program = compile_over_runtime_stub(tmp_path, *sources)
    stub = library(tmp_path, "libcublasLt.so.12", cublaslt / "libcublaslt_stub.so")
    print(expect_success([program]))
    print(expect_success([program, stub]))


PROBE_KERNEL = ("kernels", "cluster", "forward", "128", "1", "bfloat16", "8")


@pytest.fixture(scope="module")
def probe() -> Path:
    """benchmarks/gpu_probe.cu over the emulator and a stub of the CUDA runtime."""
    return build("emulated_probe") / "emulated_probe"


def probed(probe: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    result = call([probe, *words])
    assert result.returncode == status, result.stdout
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("path", "words", "kernels"),
    [
        ("cluster", "2", [(2, "bfloat16", 8, 2e-6), (2, "bfloat16", 4, 2e-6)]),
        ("cooperative", "3 bfloat16 4", [(3, "bfloat16", 4, 2e-7)]),
        ("wide", "", [(1, "bfloat16", 8, 5e-4), (1, "bfloat16", 4, 5e-4)]),
    ],
)
def test_probe_of_kernels(
    probe: Path, path: str, direction: str, words: str, kernels: list[tuple[Any, ...]]
) -> None:
    """The kernels agree with the probe's own float64, and 20 runs with each other."""
    records = probed(probe, "kernels", path, direction, "128", *words.split())
    for record, (terms, term_dtype, samples, bound) in zip(records, kernels, strict=True):
        wanted = {"kind": "kernel", "path": path, "direction": direction, "hidden": 128}
        wanted |= {"terms": terms, "term_dtype": term_dtype, "samples": samples}
        wanted |= {"not_finite": 0, "differ": 0}
        assert wanted.items() <= record.items()
        assert ("error" in record) == (direction == "forward")
        assert record.get("error", 0) < bound


@pytest.mark.slow
def test_probe_of_float16_terms(probe: Path) -> None:
    """The error, an eighth of bfloat16's, shows that the probe's weights are float16."""
    eight, four = probed(probe, "kernels", "cluster", "forward", "128", "1", "float16")
    assert (eight["samples"], four["samples"]) == (8, 4)
    assert max(eight["error"], four["error"]) < 6e-5
    (none,) = probed(probe, "kernels", "cluster", "backward", "128", "1", "float16", status=2)
    assert none["what"] == "there is no such kernel"


@pytest.mark.slow
def test_probe_names_every_kernel_once_and_what_matters_most_first(probe: Path) -> None:
    names = ("path", "direction", "hidden", "terms", "term_dtype", "samples")
    teams = [x for x in probed(probe, "facts") if x["kind"] == "teams"]
    kernels = [tuple(record[name] for name in names) for record in teams]
    assert len({*kernels}) == len(kernels)
    for path in ("cluster", "cooperative", "wide"):
        for direction in ("forward", "backward"):
            of_path = [kernel[2:] for kernel in kernels if kernel[:2] == (path, direction)]
            assert of_path[:2] == [(512, 1, "bfloat16", 8), (512, 1, "bfloat16", 4)]
            float16 = [kernel for kernel in of_path if kernel[2] == "float16"]
            assert bool(float16) == (direction == "forward" and path != "wide")
            (last,) = probed(probe, "once", path, direction, "128")
            count = sum(kernel[0] == 128 for kernel in of_path)
            assert last == {"kind": "once", "path": path, "count": count}


@pytest.mark.slow
def test_probe_of_network_and_cell(probe: Path) -> None:
    records = probed(probe, "network")
    assert {record["kind"] for record in records} == {"l2", "exchange"}
    assert {record["what"] for record in records} == {"one-way", "statistics", "all-gather"}
    assert len({record["wait"] for record in records if "wait" in record}) == 3
    (last,) = probed(probe, "once", "cell")
    assert last == {"kind": "once", "path": "cell", "count": 2}


@pytest.mark.slow
def test_probe_tells_what_it_has_seen_by_its_exit_status(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", "hang")
    (hang,) = probed(probe, *PROBE_KERNEL, status=3)
    assert hang == {
        "kind": "hang",
        **{"path": "cluster", "direction": "forward", "hidden": 128, "terms": 1},
        **{"term_dtype": "bfloat16", "samples": 8},
    }
    monkeypatch.setenv("STUB", "differ")
    (differ,) = probed(probe, *PROBE_KERNEL, status=1)
    assert differ["differ"] > 0
    monkeypatch.setenv("STUB", "missing")
    (error,) = probed(probe, "facts", status=2)
    assert "an error of the stub" in error["what"]
    (error,) = probed(probe, "kernels", "clusters", "forward", status=2)
    assert error["what"] == "PATH must be cluster, cooperative or wide, but is clusters"


CUDA_KERNELS = {
    "forward_cluster": "forward.h",
    "forward_cluster_4": "forward.h",
    "forward_cooperative": "forward.h",
    "forward_cooperative_4": "exchange.h",
    "forward_wide": "exchange.h",
    "forward_wide_4": "forward.h",
    "backward_cluster": "backward.h\\S* warp_sync",
    "backward_cluster_4": "backward.h",
    "backward_cooperative": "exchange.h",
    "backward_cooperative_4": "backward.h",
    "backward_wide": "backward.h",
    "backward_wide_4": "exchange.h",
    "prepare": "prepare.h",
    "row_wise": "rows.h",
    "cell": "cell.h",
    "cell_without_context": "cell.h",
    "product": "product_kernel.h",
}
"""Per kernel, a file in which a lost block_sync (or the operation named) must be a data race."""


@pytest.mark.slow
def test_cuda_kernels_under_thread_sanitizer(cuda_tests: Path, tmp_path: Path) -> None:
    words = launcher(tmp_path, "thread")
    program = build("test_cuda", sanitize="thread") / "test_cuda"
    planted = expect_success([cuda_tests / "test_cuda"])
    for kernel, lost in CUDA_KERNELS.items():
        expect_success([*words, program, kernel])
        lost = lost if " " in lost else rf"{lost}\S* block_sync"
        site = re.findall(rf"^{kernel} without ({lost}): (?!not shown)", planted, re.M)[0]
        result = call([*words, program, kernel, site])
        assert "data race" in result.stdout, f"{kernel} without {site}\n{result.stdout[-3000:]}"


@pytest.fixture(scope="module")
def vector_tests() -> Path:
    return build("test_vector")


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_vector(vector_tests: Path, instruction_set: str) -> None:
    program = vector_tests / f"test_vector_{instruction_set}"
    if not program.exists():
        pytest.skip(f"this build for {platform.machine()} has no {instruction_set}")
    result = call([program])
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout
    print(result.stdout)
