"""Building and running what is not Python: the C++ tests, the emulated CUDA engine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
"""The search path of programs: beside this Python first, as its environment need not be active."""


def find(*programs: str) -> str:
    """The path of the first program that there is; skips the test where there is none."""
    for program in programs:
        if found := shutil.which(program, path=SEARCH):
            return found
    pytest.skip(f"there is no {' or '.join(programs)}")


def call(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        env={"TSAN_OPTIONS": "halt_on_error=1", **os.environ, "PATH": SEARCH},
    )


def expect_success(command: Sequence[object]) -> str:
    result = call(command)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-20000:]}"
    return result.stdout


def build(
    *targets: str, sanitize: str = "", source: Path = ROOT, options: Sequence[str] = ()
) -> Path:
    """The folder that has the targets, built with -fsanitize=`sanitize` and CMake's `options`."""
    directory = build_directory(sanitize, source, options)
    if not (source / "CMakeLists.txt").exists():
        pytest.skip("the sources are not there")
    cmake = find("cmake")
    find(*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")
    ninja = shutil.which("ninja", path=SEARCH)
    configure = [cmake, "-S", source, "-B", directory, "-DMMIXER_TESTS=ON", *_pybind11()]
    configure += options
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests may share the directory
        expect_success(
            [*configure, f"-DMMIXER_SANITIZE={sanitize}", *(["-G", "Ninja"] if ninja else [])]
        )
        expect_success([cmake, "--build", directory, "--target", *targets])
    return directory


def _pybind11() -> list[str]:
    try:
        import pybind11
    except ImportError:
        return []
    return [
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]


def build_directory(sanitize: str = "", source: Path = ROOT, options: Sequence[str] = ()) -> Path:
    """The folder where a build stays, so that the next run compiles only what has changed. It lies
    in the repository's build/tests, or in MMIXER_TEST_BUILD. Each sanitizer, source, and choice of
    tools and options has a folder of its own, as CMake keeps those of its first run."""
    flags = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "MMIXER_SETS")]
    tools = repr([sys.prefix, shutil.which("ninja", path=SEARCH), *flags, source, *options])
    digest = hashlib.sha256(tools.encode()).hexdigest()[:8]
    folder = Path(os.environ.get("MMIXER_TEST_BUILD", ROOT / "build" / "tests"))
    return folder / f"{sanitize.partition(',')[0] or 'plain'}-{digest}"


def launcher(directory: Path, sanitize: str) -> list[str]:
    """The words in front of a program with which the sanitizer can run here."""
    source, program = directory / "empty.cpp", directory / "empty"
    source.write_text("int main() {}\n")
    compiler = find(*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")
    compiled = call([compiler, f"-fsanitize={sanitize}", source, "-o", program])
    if compiled.returncode != 0:
        pytest.skip(f"the compiler has no -fsanitize={sanitize}: {compiled.stdout[-1000:]}")
    # Sanitizers know only some layouts of memory, which random addresses can leave.
    setarch = shutil.which("setarch", path=SEARCH)
    fixed = [[setarch, platform.machine(), "-R"]] if setarch else []
    for words in (*fixed, []):
        started = call([*words, program])
        if started.returncode == 0:
            return words
    pytest.skip(f"-fsanitize={sanitize} cannot run here: {started.stdout[-1000:]}")
