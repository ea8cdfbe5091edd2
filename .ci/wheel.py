"""Builds this Python's wheel as a release has it, on this machine instead of in a container.

python .ci/wheel.py [FOLDER]        (dist)

The settings are those of cibuildwheel in pyproject.toml, the tools those of `pip install --group
wheel`. The wheel is built from the source archive; its tag names the oldest glibc that runs it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONTAINER_CUDA = "/opt/cuda"
"""The folder of CUDA in the settings, for which this script has one of its own."""


def main() -> None:
    """Does what cibuildwheel does in its container: CUDA, the build, the repair."""
    if platform.system() != "Linux":
        sys.exit(f".ci/wheel.py builds wheels for Linux, not {platform.system()}: use cibuildwheel")
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["linux"]
    with tempfile.TemporaryDirectory() as folder:
        built, cuda = Path(folder, "built"), str(Path(folder, "cuda"))
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run("CUDA's compiler", settings["before-all"].replace(CONTAINER_CUDA, cuda))
        for name, value in settings["environment"].items():
            os.environ[name] = value.replace(CONTAINER_CUDA, cuda)
        run("source archive", f"{sys.executable} -m build --quiet --sdist --outdir {built} {ROOT}")
        (archive,) = built.glob("*.tar.gz")
        # pip is silent until a build fails, and then shows all of it.
        pip = f"{sys.executable} -m pip wheel --quiet --no-deps --no-cache-dir"
        run("build", f"{pip} --wheel-dir {built} {archive}")
        (wheel,) = built.glob("*.whl")
        run("repair", settings["repair-wheel-command"].format(wheel=wheel, dest_dir=output))


def run(title: str, command: str) -> None:
    """Runs a command of the shell and prints what it took; its failure ends the script."""
    start = time.monotonic()
    subprocess.run(command, shell=True, check=True)
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
