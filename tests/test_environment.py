"""The table of environment variables against the sources that read them."""

from __future__ import annotations

import re
from pathlib import Path

from mmixer_kernels.environment import VARIABLES

ROOT = Path(__file__).parents[1]
OF_OTHERS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun sets them
    "XDG_CACHE_HOME",  # every program's folder of caches
    "CUDA_VISIBLE_DEVICES",  # CUDA's own
}
READ = re.compile(r"""(?:environ(?:\.get\(|\[)\s*"|ENV\{|getenv\(")(\w+)""")


def read_by_sources() -> set[str]:
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder, kinds in (("mmixer_kernels", ("py",)), ("csrc", ("cpp", "h", "cu", "cuh"))):
        sources += [path for kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}")]
    return {name for path in sources for name in READ.findall(path.read_text())}


def test_every_variable_that_is_read_is_in_the_table() -> None:
    found = read_by_sources()
    assert {"MMIXER_ENGINE", "MMIXER_CUDA", "CXX"} <= found
    assert found <= {variable.name for variable in VARIABLES} | OF_OTHERS


def test_every_variable_of_the_table_is_read() -> None:
    by_tools = {"OMP_NUM_THREADS", "CUDACXX"}  # torch's libgomp and CMake read them
    assert {variable.name for variable in VARIABLES} <= read_by_sources() | by_tools


def test_readme_has_the_table() -> None:
    rows = [f"| `{x.name}` | {x.read} | {x.meaning} |" for x in VARIABLES]
    table = "\n".join(["| variable | read at | meaning |", "|---|---|---|", *rows])
    assert table in (ROOT / "README.md").read_text()
