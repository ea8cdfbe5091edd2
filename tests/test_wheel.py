"""The wheels: which of them a release has, and what an installed one holds and loads."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmixer_kernels

ROOT = Path(__file__).parent.parent
PYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp314")


@pytest.mark.parametrize(
    ("system", "machine", "tag"),
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "arm64", "macosx_arm64"),
    ],
)
def test_a_release_has_a_wheel_for_each_python(system: str, machine: str, tag: str) -> None:
    pytest.importorskip("cibuildwheel")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"),
            *("--platform", system, "--archs", machine, str(ROOT)),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"{python}-{tag}" for python in PYTHONS]


def test_workflows_pin_the_major_versions_of_actions() -> None:
    yaml = pytest.importorskip("yaml")
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    for file in files:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for step in job["steps"]:
                assert re.search(r"@v\d+$", step.get("uses", "@v0")), (file.name, step)
                assert ("uses" in step) != ("run" in step), (file.name, step)


@pytest.mark.skipif(sys.platform != "linux", reason=".ci/wheel.py is for Linux")
def test_a_folder_that_cannot_be_is_told_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "dist").write_text("a file\n")
    command = [sys.executable, str(ROOT / ".ci" / "wheel.py"), str(tmp_path / "dist")]
    result = subprocess.run(command, capture_output=True, text=True)
    told = f"the wheel cannot be written to {tmp_path / 'dist'}: File exists\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", told)


def test_an_installation_is_the_package_alone() -> None:
    """It has no tests or sources of the extension, and no library beside it."""
    try:
        distribution = importlib.metadata.distribution("mmixer_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mmixer_kernels is not installed")
    package = Path(str(distribution.locate_file("mmixer_kernels")))
    if package != Path(mmixer_kernels.__file__).parent or not distribution.read_text("RECORD"):
        pytest.skip("the package that runs is the checkout's")
    installed = {
        str(path)
        for path in distribution.files or ()
        if "__pycache__" not in path.parts and not path.parts[0].endswith(".dist-info")
    }
    kinds = ("*.py", "py.typed", "recipes/*.toml")
    wanted = [path for kind in kinds for path in (ROOT / "mmixer_kernels").rglob(kind)]
    extension = f"mmixer_kernels/{Path(mmixer_kernels._native.__file__).name}"
    assert installed == {str(path.relative_to(ROOT)) for path in wanted} | {extension}


_LOADED = """
import torch
from mmixer_kernels import FusedMCU
FusedMCU(4, 0, 8, engine="cpu")(torch.zeros(3, 2, 4))
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if "libgomp" in line}, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_extension_runs_in_the_threads_of_torchs_libgomp() -> None:
    """A second libgomp would have a second pool of threads beside torch's."""
    command = [sys.executable, "-c", _LOADED]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(result.stdout.split()) == 1, result.stdout
