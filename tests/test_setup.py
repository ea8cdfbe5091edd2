"""The build."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import sass

ROOT = Path(__file__).parent.parent
_CAN_BUILD = bool(shutil.which("cmake") and shutil.which("ninja"))


def test_without_a_compiler_one_line_says_so(tmp_path):
    empty = {key: value for key, value in os.environ.items() if key != "CXX"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "build_ext"],
        cwd=tmp_path,
        env={**empty, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("mmixer_kernels needs a C++17 compiler, GCC or Clang, and found none")


@pytest.mark.slow
@pytest.mark.skipif(not _CAN_BUILD, reason="needs cmake and ninja")
def test_a_second_install_does_not_look_for_the_first_ones_tools(tmp_path):
    pytest.importorskip("pybind11")
    temporary = tmp_path / "build"
    temporary.mkdir()
    (temporary / "CMakeCache.txt").write_text(
        f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n"
        "CMAKE_GENERATOR:INTERNAL=Ninja\n"
        "CMAKE_MAKE_PROGRAM:FILEPATH=/gone/bin/ninja\n"
    )
    configure_only = tmp_path / "bin" / "cmake"
    configure_only.parent.mkdir()
    configure_only.write_text(
        f'#!/bin/sh\n[ "$1" = --build ] || exec {shutil.which("cmake")} "$@"\n'
    )
    configure_only.chmod(0o755)
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace", "--force"]
    result = subprocess.run(
        [*command, "--build-temp", str(temporary)],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{configure_only.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (temporary / "build.ninja").is_file()


def configure(build: Path, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    pybind11 = pytest.importorskip("pybind11")
    return subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-DPYBIND11_FINDPYTHON=ON"),
            *("-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not _CAN_BUILD, reason="needs cmake and ninja")
def test_a_build_for_some_instruction_sets(tmp_path):
    off = "-DMMIXER_CUDA=OFF"
    every = configure(tmp_path / "every", off, MMIXER_SETS="")
    known = re.search("CPU engine: instruction sets (.*)", every.stdout)[1]
    assert known.split(";")[0] == "baseline"
    wrong = configure(tmp_path / "wrong", off, MMIXER_SETS="baseline;avx3")
    assert wrong.returncode != 0
    words = f"'avx3' is none of them: {', '.join(known.split(';'))}"
    assert words in " ".join(wrong.stderr.split())

    configure(tmp_path, off, MMIXER_SETS="baseline").check_returncode()
    subprocess.run(["cmake", "--build", str(tmp_path), "--target", "_native"], check=True)
    command = [sys.executable, "-c", "import _native; print(_native.build_info())"]
    printed = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    info = ast.literal_eval(printed.stdout.decode())
    assert (info["instruction_sets"], info["instruction_sets_here"]) == ("baseline", ["baseline"])


def test_a_source_archive_has_all_that_the_extension_is_built_of(tmp_path):
    metadata = ("egg_info", "--egg-base", str(tmp_path))
    subprocess.run(
        [sys.executable, "setup.py", *metadata, "sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    wanted = [ROOT / "CMakeLists.txt", ROOT / "benchmarks" / "gpu_probe.cu"]
    wanted += [path for folder in ("csrc", "python") for path in (ROOT / folder).rglob("*.*")]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= packed


_NOT_INSTALLED = """
import importlib.metadata
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
installed = importlib.metadata.version
importlib.metadata.version = version
import mmixer_kernels
print(mmixer_kernels.__version__, installed("mmixer_kernels"))
"""


def test_a_copy_that_is_not_installed_can_be_imported_and_knows_its_version():
    """CMake alone may have built the extension."""
    result = subprocess.run(
        [sys.executable, "-c", _NOT_INSTALLED], capture_output=True, text=True, check=True
    )
    own, installed = result.stdout.split()
    assert own == installed


@pytest.mark.slow
@pytest.mark.skipif(not (_CAN_BUILD and shutil.which("nvcc")), reason="needs nvcc")
@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        ("8.0", "80-real;90-virtual"),
        ("9.0\n9.0\n8.6\n7.5", "90-real;86-real;90-virtual"),
        ("99.0", "80-real;90-real"),
    ],
)
def test_default_architectures(tmp_path, capabilities, architectures):
    """The default is the GPUs that are here, as far as nvcc and the engine know them, else all
    kinds. PTX of 9.0 is always built: the kernels of clusters, built for 8.x alone, would be empty
    on a newer GPU."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = configure(tmp_path / "build", "-DMMIXER_CUDA=ON", "-DMMIXER_CUDA_ARCHS=", PATH=path)
    assert result.returncode == 0, result.stderr
    assert f"architectures {architectures}" in result.stdout
    assert "90-virtual\n" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (_CAN_BUILD and shutil.which("nvcc")), reason="needs nvcc")
def test_all_kinds_of_gpus_are_compiled_for(tmp_path):
    """The default where there is no GPU has more kinds than the wheel, which CI builds."""
    dump = sass.cuobjdump() or pytest.skip("there is no cuobjdump: install CUDA's or triton")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    build, path = tmp_path / "build", f"{tmp_path}:{os.environ['PATH']}"
    configure(build, "-DMMIXER_CUDA=ON", "-DMMIXER_CUDA_ARCHS=", PATH=path).check_returncode()
    object = build / "CMakeFiles" / "mmixer_cuda.dir" / "csrc" / "cuda" / "products.cu.o"
    command = ["cmake", "--build", str(build), "--target", str(object.relative_to(build))]
    subprocess.run(command, check=True, capture_output=True)
    known = subprocess.check_output(["nvcc", "--list-gpu-code"], text=True).split()
    listed = subprocess.check_output([dump, "-lelf", "-lptx", object], text=True)
    built = set(re.findall(r"sm_\d+(?=\.cubin)", listed))
    assert built == {"sm_80", "sm_90"} | {"sm_100", "sm_120"} & set(known)
    assert "sm_80.ptx" in listed
