"""The build."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
