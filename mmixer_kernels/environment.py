"""The environment variables that the library and its build read, for `info` and the README."""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable: its name, when it is read, and what it does."""

    name: str
    read: str
    meaning: str


VARIABLES = (
    Variable("MMIXER_ENGINE", "each call", 'the engine of units with `engine="auto"`'),
    Variable("MMIXER_CUDA_PATHS", "import", "the CUDA engine's paths, separated by commas"),
    Variable("MMIXER_CUDA_SAMPLES", "import", "samples per team of the CUDA engine: `4`, `8`"),
    Variable("MMIXER_CACHE", "each call", "the folder of what `tune` keeps for the Triton engine"),
    Variable("MMIXER_COMMIT", "each run", "the commit in results, for copies without git's files"),
    Variable("OMP_NUM_THREADS", "import", "the threads of torch, which are the CPU engine's"),
    Variable("MMIXER_CUDA", "build", "`OFF` leaves the CUDA engine out where there is `nvcc`"),
    Variable("MMIXER_CUDA_ARCHS", "build", "the CUDA engine's architectures, as CMake names them"),
    Variable("MMIXER_SETS", "build", "instruction sets beside the baseline: `avx2;avx512`"),
    Variable("CXX", "build", "the C++ compiler: GCC or Clang"),
    Variable("CUDACXX", "build", "the CUDA compiler, where `nvcc` is not on the path"),
)
"""Every variable that a user may set, in the order in which `info` prints them."""
