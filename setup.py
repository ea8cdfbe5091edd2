"""Builds `mmixer_kernels._native` with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """The command that builds the extension, by CMake."""

    def build_extension(self, ext: Extension) -> None:
        compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
        if not any(name and shutil.which(name.split()[0]) for name in compilers):
            sys.exit(
                "mmixer_kernels needs a C++17 compiler, GCC or Clang, and found none: install one "
                "(Debian, Ubuntu: apt-get install g++) or set CXX to its path"
            )
        import pybind11

        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # The extension lies beside the sources too, as `python -m mmixer_kernels.train` in the
        # checkout imports those.
        in_tree = source / "mmixer_kernels"
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            *("-S", str(source), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={in_tree}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        # pip's build environment, whose paths an older cache names, is gone by now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        if target.parent != in_tree:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(in_tree / target.name, target)


setup(ext_modules=[Extension("mmixer_kernels._native", [])], cmdclass={"build_ext": CMakeBuild})
