"""The extension `_limits` (benchmarks/limits), which is built where it is first asked for."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "benchmarks"


@functools.cache
def module() -> ModuleType:
    """Raises subprocess.CalledProcessError, behind the compiler's own words, where it cannot be
    built."""
    import pybind11

    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DMMIXER_CUDA=OFF"),
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", "_limits"]):
        subprocess.run(command, check=True, env={**os.environ, "PATH": programs}, stdout=2)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = BUILD / "benchmarks" / "limits" / f"_limits{suffix}"
    spec = importlib.util.spec_from_file_location("_limits", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
