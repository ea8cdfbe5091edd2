"""Whether a call may pass by the dispatcher; what else looks on is in tests/tools.py."""

import logging
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mmixer_kernels import FusedMCU, dispatch, reference
from mmixer_kernels.dispatch import is_plain


def tensors():
    return [torch.randn(2, 3), torch.randn(3), torch.nn.Parameter(torch.randn(3))]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_that_nothing_looks_at(mode):
    """A call is plain in every torch that is supported; one that lacks a private function has
    none."""
    with mode():
        for _ in range(2):
            assert is_plain(tensors())
            assert is_plain([x.double() for x in tensors()])
            assert is_plain(tensors()[:1] * 3)
        made = [torch.randn(2, 3), *tensors()]
        assert is_plain(made)


def test_lengths_that_only_the_dispatcher_knows():
    """The lengths in memory are negative; their values, which only the dispatcher knows, count."""
    unit, x, c = FusedMCU(3, 2, 4, engine="cpu"), torch.randn(5, 2, 3), torch.randn(2, 2)
    lengths = torch.tensor([5, 2])
    with torch.no_grad():
        truth = unit(x, c, None, lengths)
        torch.testing.assert_close(unit(x, c, None, torch._neg_view(-lengths)), truth)


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "negated": lambda: torch._neg_view(torch.randn(3)),
    "zero": lambda: torch._efficientzerotensor(3),
    "subclass": lambda: torch.randn(3).as_subclass(Subclass),
    "meta": lambda: torch.empty(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3)]),
    "list": lambda: [1.0, 2.0, 3.0],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("position", range(3))
def test_an_operand_that_only_the_dispatcher_knows(name, position):
    given = tensors()
    assert is_plain(given)
    given[position] = UNUSUAL[name]()
    assert not is_plain(given)


ONLOOKERS = {
    "mode": TorchDispatchMode,
    "mode of torch's own": FakeTensorMode,
    "dual level": forward_ad.dual_level,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("name", ONLOOKERS)
def test_what_looks_on(name):
    given = tensors()
    assert is_plain(given)
    with ExitStack() as stack:
        stack.enter_context(ONLOOKERS[name]())
        assert not is_plain(given)
    assert is_plain(given)


@pytest.mark.filterwarnings("ignore")
def test_a_transform_or_tracer_looks_on():
    known, seen = [torch.zeros(2)], []
    assert is_plain(known)

    def function(x):
        seen.append(is_plain(known))  # not even of the transform
        return x * 2

    torch.vmap(function)(torch.zeros(2))
    torch.func.grad(function)(torch.tensor(1.0))
    torch.jit.trace(function, torch.zeros(2), check_trace=False)
    make_fx(function)(torch.zeros(2))
    assert seen == [False] * 4


def test_what_is_remembered_is_limited(monkeypatch):
    monkeypatch.setattr(dispatch, "_known", {})
    for dims in range(40):
        assert is_plain([torch.zeros([1] * dims)])
    assert len(dispatch._known[1]) == dispatch._MOST_GUARDS


def test_equations_are_told_of_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    unit = FusedMCU(3, 2, 4)
    with caplog.at_level(logging.DEBUG, "mmixer_kernels.dispatch"):
        for _ in range(2):
            with forward_ad.dual_level():
                unit(torch.randn(5, 2, 3), torch.randn(2, 2))
    (record,) = caplog.records
    assert "forward-mode differentiation has no rule for the fused ops" in record.getMessage()


class Lacking:
    """A module without one of its members."""

    def __init__(self, module, path):
        self.module, self.path = module, path

    def __getattr__(self, name):
        first, _, rest = self.path.partition(".")
        if name != first:
            return getattr(self.module, name)
        if not rest:
            raise AttributeError(name)
        return Lacking(getattr(self.module, name), rest)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own use
@pytest.mark.parametrize(
    ("module", "path", "is_needed"),
    [
        ("torch", "_C._dynamo.guards.TensorGuards", True),
        ("torch", "_C._dispatch_tls_local_include_set", True),
        ("torch", "_C._dispatch_keys", True),
        ("torch", "_C.DispatchKeySet", True),
        ("forward_ad", "_current_level", True),
    ],
)
def test_without_a_private_function_of_torch(module, path, is_needed, monkeypatch):
    """Calls are right all the same, and go through the dispatcher where it was needed."""
    monkeypatch.setattr(dispatch, "_known", {})
    dispatch._keys.cache_clear()
    monkeypatch.setattr(dispatch, module, Lacking(getattr(dispatch, module), path))
    assert is_plain(tensors()) == (not is_needed)
    unit, exact = FusedMCU(3, 2, 4).double(), reference.MCU(3, 2, 4).double()
    exact.load_state_dict(unit.state_dict())
    x, c = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(unit(x, c), exact(x, c))
        torch.testing.assert_close(unit(torch._neg_view(-x), c), exact(x, c))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            ours, truth = (forward_ad.unpack_dual(u(dual, c)[0]) for u in (unit, exact))
    torch.testing.assert_close(tuple(ours), tuple(truth))
