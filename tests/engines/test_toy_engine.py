"""An engine is one file, here toy_engine.py, and one entry in the registry: it passes the contract,
and everything that names engines names it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import toy_engine
from contract import Contract
from torch import Tensor

from mmixer_kernels import FusedMCU, MMixer, engines, info
from mmixer_kernels.engines import choose
from mmixer_kernels.training.options import ModelOptions

registry = sys.modules["mmixer_kernels.engines"]  # the package's attribute is the function


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENGINES", (toy_engine, *registry.ENGINES))


class TestContract(Contract):
    ENGINE = "toy"


def test_the_first_of_a_device_is_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert choose("auto", x) == "toy"
    assert choose("auto", torch.zeros(1, device="meta")) == "reference"
    assert choose("cpu", x) == "cpu"
    monkeypatch.setattr(registry, "ENGINES", (*registry.ENGINES[1:], toy_engine))
    assert choose("auto", x) == "cpu"
    assert choose("toy", x) == "toy"
    monkeypatch.setenv("MMIXER_ENGINE", "toy")
    assert choose("auto", x) == "toy"


def test_it_is_named_wherever_engines_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert engines()["toy"].reason.startswith("NumPy")
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"]["toy"].startswith("available")
    with pytest.raises(ValueError, match="engine must be one of auto, toy, cpu"):
        FusedMCU(2, 3, 4, engine="fast")
    with pytest.raises(ValueError, match='"toy" does not take this call: it takes tensors on cpu'):
        choose("toy", torch.zeros(1, device="meta"))
    assert ModelOptions(engine="toy").engine == "toy"
    with pytest.raises(ValueError, match="one of auto, toy, cpu"):
        ModelOptions(engine="fast")


def test_a_network_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """M-Mixer's G weight sets in one call."""
    network = MMixer([3, 4], 5, hidden_size=6, engine="toy")
    exact = MMixer([3, 4], 5, hidden_size=6, engine="reference")
    exact.load_state_dict(network.state_dict())
    features = [torch.randn(2, 3, size) for size in (3, 4)]
    calls = []
    forward = toy_engine.forward
    monkeypatch.setattr(toy_engine, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    logits = network(features)
    assert calls == [1]
    torch.testing.assert_close(logits, exact(features))
    grads = torch.autograd.grad(logits.sum(), list(network.parameters()))
    expected = torch.autograd.grad(exact(features).sum(), list(exact.parameters()))
    torch.testing.assert_close(grads, expected)


def test_torchs_tools_follow_it() -> None:
    """torch.func, a second derivative and torch.compile ask nothing of an engine."""
    unit = FusedMCU(2, 3, 4, engine="toy", dtype=torch.float64)
    x, context = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return unit(x, context)[0].square().sum()

    each = torch.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each[0], torch.func.grad(loss)(x))
    assert torch.autograd.gradgradcheck(loss, x.requires_grad_(), fast_mode=True)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, context)[0], unit(x, context)[0])
