"""The surroundings of every test: one thread, a seed, and Triton's interpreter without a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# torch and triton read these at import. pytest-xdist starts a process per processor, hence one
# thread each, also in processes that a test starts; tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `nan_filled_memory`

import emulation
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


MOST_WORKERS = 8
"""Each of them imports torch, and few of the tests take long."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A test that is named by itself runs, slow or not, in this process. Others run in a worker per
    processor, unless -n or --dist says otherwise, pytest-xdist is not installed, or somebody looks
    on (-s, --trace)."""
    option = config.option
    named = bool(config.args) and all("::" in word for word in config.args)
    if named and option.markexpr == "not slow":
        option.markexpr = ""
    watched = option.capture == "no" or option.trace
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    chosen = getattr(option, "numprocesses", 0) is not None or option.dist != "no"
    if not (named or watched or is_worker or chosen):
        option.numprocesses, option.dist = "auto", "worksteal"
        option.maxprocesses = option.maxprocesses or MOST_WORKERS


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory is NaN: what a kernel reads before it is written shows.

    It needs PyTorch's deterministic algorithms, which users of the training do not have: so only
    tests of kernels and modules have it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def no_compiled_code_of_another_test() -> Iterator[None]:
    """torch.compile counts how often it compiled a function over all of a process's modules, and
    from some number on refuses to."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of three epochs, which a test must copy to change it."""
    from mmixer_kernels import train

    output = tmp_path_factory.mktemp("tiny") / "run"
    arguments = [
        *("--frames", "4", "--frame-size", "8", "--samples", "32", "--evaluation-samples", "32"),
        *("--model.hidden-size", "8", "--loader.batch-size", "5", "--epochs", "3"),
        *("--optimizer.learning-rate", "0.01", "--output", str(output)),
        *("--device", "cpu"),
    ]
    assert train.main(arguments) == 0
    return output


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test sets."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The CUDA engine's kernels, run by csrc/emulator on this CPU."""
    return emulation.module()


@pytest.fixture
def emulator(emulated: ModuleType) -> Iterator[ModuleType]:
    """The CUDA engine takes CPU tensors, and its kernels run here."""
    with emulation.engine(emulated):
        yield emulated


@pytest.fixture
def default_device() -> Iterator[None]:
    """PyTorch's default device is not the operands' own."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
