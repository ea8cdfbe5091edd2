from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import outcome, unequal
from tiny import TINY, interrupt_after, trainer
from torch import nn

from mmixer_kernels import evaluate, train
from mmixer_kernels.stop import Interrupted, Stop
from mmixer_kernels.training import checkpoint, loop, mixed_precision

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
def test_it_trains_in_the_dtype_and_resumes_bit_equal(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--precision", precision, "--optimizer.clip-norm", "1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    first = trainer(*more)
    dtypes: set[torch.dtype] = set()
    first.model.mixer.classifier.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    with Stop() as stop:
        first.fit(whole, stop)
    assert dtypes == {DTYPES[precision]}
    assert {parameter.dtype for parameter in first.model.parameters()} == {torch.float32}
    second = trainer(*more)
    interrupt_after(4, second, monkeypatch)
    with pytest.raises(Interrupted), Stop() as stop:
        second.fit(stopped, stop)
    state = checkpoint.load(stopped / "last.pt")
    assert bool(state["scaler"]) == (precision == "float16")
    third = trainer(*more)
    third.load_state(state)
    with Stop() as stop:
        third.fit(stopped, stop)
    assert unequal(outcome(stopped), outcome(whole)) == []


def test_float16_skips_an_update_that_overflows_and_halves_the_scale() -> None:
    trained = trainer("--precision", "float16")
    trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    batch = iter(loop.batches.load(trained.data.train, [[0, 1, 2]], 0))
    trained._train_step([[0, 1, 2]], batch, 3)
    assert trained.scaler.get_scale() == 2.0**39
    assert unequal(dict(trained.model.state_dict()), before) == []


def test_so_does_an_optimizer_of_a_checkpoint_from_before_updates_were_fused() -> None:
    trained = trainer("--precision", "float16")
    state = trained.state()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    state["scaler"]["scale"] = 2.0**40
    trained.load_state(state)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    batch = iter(loop.batches.load(trained.data.train, [[0, 1, 2]], 0))
    trained._train_step([[0, 1, 2]], batch, 3)
    assert trained.scaler.get_scale() == 2.0**39
    assert unequal(dict(trained.model.state_dict()), before) == []


def test_the_gradient_is_clipped_after_the_scale_is_taken_off() -> None:
    norms = []
    for precision in ("float32", "float16"):
        trained = trainer("--precision", precision, "--optimizer.clip-norm", "0.01")
        if precision == "float16":
            trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        batch = iter(loop.batches.load(trained.data.train, [[0, 1, 2]], 0))
        trained._train_step([[0, 1, 2]], batch, 3)
        gradients = [p.grad.flatten() for p in trained.model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def lacking(monkeypatch: pytest.MonkeyPatch, unit: type[nn.Module], lack: str) -> None:
    """Acts as a device on which PyTorch lacks float16 for a unit's forward, for its forward with
    gradients, or for its backward."""
    forward = unit.forward

    def call(self: nn.Module, *arguments: Any) -> Any:
        narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.half
        if narrow and (lack == "forward" or (lack == "gradient" and torch.is_grad_enabled())):
            fail()
        output, state = forward(self, *arguments)
        if narrow and lack == "backward" and torch.is_grad_enabled():
            (state[0] if isinstance(state, tuple) else state).register_hook(fail)
        return output, state

    def fail(*arguments: Any) -> None:
        raise RuntimeError("could not create a primitive descriptor.\nAnd more")

    monkeypatch.setattr(unit, "forward", call)


@pytest.mark.parametrize("lack", ["forward", "gradient", "backward"])
@pytest.mark.parametrize("unit", ["lstm", "gru"])
def test_a_precision_that_the_device_lacks_is_found_before_training(
    tmp_path: Path,
    unit: str,
    lack: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacking(monkeypatch, nn.LSTM if unit == "lstm" else nn.GRU, lack)
    output = tmp_path / "run"
    arguments = [*TINY, "--device", "cpu", "--model.unit", unit, "--output", str(output)]
    assert train.main([*arguments, "--precision", "float16"]) == 2
    assert not output.exists()
    device, error = capsys.readouterr().err.splitlines()
    assert device.endswith(f", PyTorch's {unit}, float16")
    assert error == (
        f"error: --precision must be float32 or bfloat16 for --model.unit {unit} on this cpu, but "
        "is float16, in which the network cannot be computed: could not create a primitive "
        "descriptor"
    )


def test_evaluation_may_take_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--epochs", "1", "--device", "cpu", "--model.unit", "gru", "--precision", "float16"]
    assert train.main([*TINY, *more, "--output", str(tmp_path)]) == 0
    lacking(monkeypatch, nn.GRU, "forward")
    capsys.readouterr()
    path = str(tmp_path / "best.pt")
    assert evaluate.main([path]) == 2
    assert "--precision must be float32 or bfloat16" in capsys.readouterr().err
    assert evaluate.main([path, "--precision", "float32"]) == 0


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("unit", ["mcu", "gru", "lstm"])
def test_no_precision_here_ends_in_a_traceback(
    tmp_path: Path, unit: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # float32 features reach the unit itself: PyTorch's CPU kernels of these two lack the most.
    random = np.random.default_rng(0)
    for name in ("train", "test"):
        arrays = {key: random.standard_normal((8, 3, 4)) for key in ("a", "b")}
        np.savez(tmp_path / f"{name}.npz", label=np.arange(8) % 2, **arrays)
    code = train.main(
        [
            *("--data", "arrays", "--root", str(tmp_path), "--output", str(tmp_path / "run")),
            *("--model.unit", unit, "--precision", precision, "--device", "cpu"),
            *("--epochs", "1", "--model.hidden-size", "8"),
        ]
    )
    assert code == 0 or "error: --precision must be" in capsys.readouterr().err


def test_the_trial_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer("--precision", "bfloat16")
    recognizer = trained.model
    recognizer.extractors[0] = nn.Sequential(recognizer.extractors[0], nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in recognizer.state_dict().items()}
    mixed_precision.check(recognizer, trained.data.train, trained.options)
    assert unequal(dict(recognizer.state_dict()), before) == []
    assert all(parameter.grad is None for parameter in recognizer.parameters())
    assert all(module.training for module in recognizer.modules())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # of no precision's making
        mixed_precision.check(recognizer, trained.data.train, trained.options)
