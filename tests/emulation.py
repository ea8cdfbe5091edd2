"""The CUDA engine over csrc/emulator: on CPU tensors, its kernels run by this CPU or counted."""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch
from building import build
from torch.profiler import ProfilerActivity, profile

from mmixer_kernels import dispatch


@functools.cache
def module() -> ModuleType:
    """The extension's part for CUDA, built over the emulator; skips the test where it cannot be."""
    pytest.importorskip("pybind11")
    library = build("_emulated") / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated


@contextmanager
def engine(emulated: ModuleType) -> Iterator[None]:
    """The engine "cuda" takes CPU tensors, and its kernels go to the emulator."""
    from helpers import forget_cuda_calls

    from mmixer_kernels.engines import cuda
    from mmixer_kernels.engines.protocol import EngineState

    state = EngineState(True, "emulated")
    precision = torch.get_float32_matmul_precision()
    emulated.configure()
    forget_cuda_calls()
    with mock.patch.multiple(
        cuda, _native=emulated, state=lambda device=None: state, DEVICES=("cpu", "cuda")
    ):
        yield
    torch.set_float32_matmul_precision(precision)
    forget_cuda_calls()
    emulated.configure()


def launches(emulated: ModuleType, call: Callable[[], object]) -> dict[str, int]:
    """The names of what a call starts on the device, and how often: kernels, clears and products,
    as the emulator counts them, and those of torch's operators that start something on a GPU.

    torch's operators are seen by its profiler, which, unlike a dispatch mode, leaves the call the
    way that it takes by itself, once the call does not see the profiler.
    """
    call()  # what only a first call does
    emulated.clear_launches()
    with (
        mock.patch.object(dispatch, "_is_profiled", return_value=False),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded,
    ):
        call()
    counts = Counter(emulated.launches())
    for event in recorded.events():
        if event.cpu_parent is None:
            counts.update(_operators(event))
    return dict(counts)


def _operators(event: torch.autograd.profiler_util.FunctionEvent) -> list[str]:
    """The innermost operators that write what they return. Those of an allocation fill it with NaN
    for a test, and are left out."""
    if event.name.startswith(_ALLOCATIONS):
        return []
    inner = [name for child in event.cpu_children for name in _operators(child)]
    return inner or [event.name] * _writes(event.name)


_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::resize_")
_VIEWS = ("aten::_unsafe_view", "aten::_reshape_alias")
"""Views that their schemas do not tell to be some."""


@functools.cache
def _writes(name: str) -> bool:
    """Whether an operator is one of torch's that is neither a view nor made of others."""
    if not name.startswith("aten::") or name in _VIEWS:
        return False
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(
        not operator.is_view
        and not torch._C._dispatch_has_kernel_for_dispatch_key(
            operator.name(), "CompositeImplicitAutograd"
        )
        for operator in overloads
        if operator.name() in _dispatched()
    )


@functools.cache
def _dispatched() -> frozenset[str]:
    """The names that the dispatcher knows; the others are TorchScript's alone."""
    return frozenset(name.removesuffix(".") for name in torch._C._dispatch_get_all_op_names())
