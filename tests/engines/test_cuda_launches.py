"""The launches of a call of the CUDA engine, and their stream and device: they are counted by
csrc/emulator and not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import emulation
import helpers
import pytest
import torch
from helpers import Size, problem
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmixer_kernels import FusedMCU
from mmixer_kernels.engines import cuda
from mmixer_kernels.functional import mcu, mcu_group
from mmixer_kernels.problem import Cotangents, Need, Step

STEPS, BATCH, HIDDEN = 3, 2, 16


@pytest.fixture
def counting(emulator: ModuleType) -> ModuleType:
    emulator.configure(run=False)
    return emulator


CallAndLeaves = tuple[Callable[[], Any], list[Tensor]]
"""A call, and all that has a gradient."""


def group_call(groups: int, dtype: torch.dtype, context: bool = True) -> CallAndLeaves:
    """A call of so many weight sets of equal sizes."""
    context_size = HIDDEN if context else 0
    units = [FusedMCU(HIDDEN, context_size, HIDDEN, dtype=dtype) for _ in range(groups)]
    inputs = [torch.randn(STEPS, BATCH, HIDDEN, dtype=dtype) for _ in range(groups)]
    contexts = [torch.randn(BATCH, HIDDEN, dtype=dtype) for _ in range(groups if context else 0)]
    weights = [unit.weights() for unit in units]
    leaves = [x.requires_grad_() for x in (*inputs, *contexts)]
    leaves += [x for unit in units for x in unit.parameters()]
    return lambda: mcu_group(inputs, contexts or None, weights, engine="cuda"), leaves


def call_of_both_directions(dtype: torch.dtype, context: bool) -> CallAndLeaves:
    units = [FusedMCU(HIDDEN, HIDDEN if context else 0, HIDDEN, dtype=dtype) for _ in range(2)]
    input = torch.randn(STEPS, BATCH, HIDDEN, dtype=dtype, requires_grad=True)
    given = torch.randn(BATCH, HIDDEN, dtype=dtype, requires_grad=True) if context else None
    forward, backward = (unit.weights() for unit in units)
    leaves = [input, *([] if given is None else [given])]
    leaves += [x for unit in units for x in unit.parameters()]
    return lambda: mcu(input, given, (forward, backward), engine="cuda"), leaves


def test_what_is_counted_does_not_run(counting: ModuleType) -> None:
    call, _ = group_call(1, torch.float32)
    with torch.no_grad():
        counting.clear_launches()
        assert call()[0].isnan().all()  # as fresh memory is
        assert counting.launches()["Forward"] == 1
        counting.configure()
        assert call()[0].isfinite().all()
    assert counting.launches()["Forward"] == 2


def test_operators_of_torch_are_launches(counting: ModuleType) -> None:
    x = torch.randn(3, 4)

    def call() -> None:
        torch.empty(5).view(1, 5), x.to(x.dtype).T.reshape(12)[2:]  # a copy, by reshape
        x @ x.T

    assert emulation.launches(counting, call) == {"aten::copy_": 1, "aten::mm": 1}


@pytest.mark.parametrize("path", ["cluster", "cooperative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("calls", "forward", "both"),
    [
        ("group of 1", 9, 27),
        ("group of 3", 11, 33),
        ("group of 1 without context", 5, 17),
        ("group of 3 without context", 7, 23),
        # Each direction has a gradient of the input, and of the context, which autograd adds.
        ("both directions", 9, 30),
        ("both directions without context", 5, 19),
    ],
)
def test_launches_of_a_pass(
    counting: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    dtype: torch.dtype,
    calls: str,
    forward: int,
    both: int,
) -> None:
    monkeypatch.setattr(cuda, "PATHS", (path,))
    context = "without" not in calls
    if calls.startswith("both"):
        call, leaves = call_of_both_directions(dtype, context)
    else:
        call, leaves = group_call(int(calls.split()[2]), dtype, context)
    cotangents = [torch.ones_like(x) for x in call()]

    def call_and_backward() -> None:
        torch.autograd.grad(call(), leaves, cotangents)

    for count, passes in (
        (forward, torch.no_grad()(call)),
        (forward, call),
        (both, call_and_backward),
    ):
        launched = emulation.launches(counting, passes)
        assert launched["Forward"] == 1
        assert sum(launched.values()) == count, launched


CURRENT, OPERANDS = 0, 1
"""The GPU that is the current one outside a call, and that of the operands."""
STREAMS = {CURRENT: 0x100, OPERANDS: 0x200}
"""The current stream of each GPU, by its handle."""


class _OnSecondGPU(Tensor):
    """A tensor of this machine's that says that it is on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", OPERANDS)


class _MemoryIsHere(TorchFunctionMode):
    """Memory of the second GPU is this machine's."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == _OnSecondGPU.device:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class _TwoGPUs:
    """The extension over the emulator, beside torch.cuda's words on two GPUs."""

    def __init__(self, native: ModuleType) -> None:
        self.native, self.current = native, CURRENT
        self.asked: dict[str, set[int]] = {}
        """The GPUs that were the current ones when the extension launched something, or planned
        to, by the names of its functions."""

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        before, self.current = self.current, _index(device)
        try:
            yield
        finally:
            self.current = before

    def current_stream(self, device: torch.device | int | None = None) -> SimpleNamespace:
        return SimpleNamespace(
            cuda_stream=STREAMS[self.current if device is None else _index(device)]
        )

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.native, name)
        if isinstance(found, type) or not callable(found):
            return found

        def called(*args: Any, **kwargs: Any) -> Any:
            count = sum(self.native.launches().values())
            result = found(*args, **kwargs)
            if "plan" in name or sum(self.native.launches().values()) > count:
                self.asked.setdefault(name, set()).add(self.current)
            return result

        return called


def _index(device: torch.device | int) -> int:
    return device if isinstance(device, int) else device.index


@pytest.fixture
def two_gpus(counting: ModuleType, monkeypatch: pytest.MonkeyPatch) -> _TwoGPUs:
    counting.clear_launches()
    machine = _TwoGPUs(counting)
    monkeypatch.setattr(cuda, "_native", machine)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "current_stream", machine.current_stream)
    monkeypatch.setattr(cuda, "_current_stream", STREAMS.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return machine


@pytest.mark.parametrize("passes", ["forward", "backward", "step"])
@pytest.mark.parametrize("path", ["cell", "cluster", "cooperative", "step"])
def test_all_is_launched_on_the_operands_gpu_and_its_current_stream(
    two_gpus: _TwoGPUs, monkeypatch: pytest.MonkeyPatch, path: str, passes: str
) -> None:
    """Also by a call that fails the current GPU is left as it was."""
    if (path, passes) == ("cell", "backward"):
        pytest.skip("a step has no backward of its own")
    monkeypatch.setattr(cuda, "PATHS", (path, "step"))
    on_gpu = problem(Size(3, 2, 4, 5, HIDDEN), lengths=True, dtype=torch.float32).call()
    on_gpu = on_gpu.map(lambda x: x.as_subclass(_OnSecondGPU))
    weights = on_gpu.weights[0]

    def call() -> None:
        if passes == "step":
            cuda.step(Step(on_gpu.inputs[0][0], on_gpu.contexts[0], weights, None))
            return
        output, h_n, saved = cuda.forward(on_gpu, "gates")
        if passes == "backward":
            two_gpus.native.clear_launches()
            assert saved is not None
            saved = saved.as_subclass(_OnSecondGPU)
            cuda.backward(on_gpu, saved, "gates", Cotangents(output, h_n), Need(True, True))

    with _MemoryIsHere():
        call()
    assert two_gpus.native.streams() == {STREAMS[OPERANDS]}
    assert two_gpus.asked
    assert set.union(*two_gpus.asked.values()) == {OPERANDS}, two_gpus.asked
    assert two_gpus.current == CURRENT

    two_gpus.native.configure(run=False, resident_clusters=0, resident_blocks=0)
    helpers.forget_cuda_calls()
    monkeypatch.setattr(cuda, "PATHS", ("cluster",))
    with _MemoryIsHere(), pytest.raises(RuntimeError, match="cluster"):
        call()
    assert two_gpus.current == CURRENT
