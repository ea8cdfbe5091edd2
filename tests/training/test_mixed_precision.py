from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outcomes import outcome, unequal
from tiny import interrupt_after, trainer

from mmixer_kernels.training import checkpoint, loop

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
    with loop.Stop() as stop:
        first.fit(whole, stop)
    assert dtypes == {DTYPES[precision]}
    assert {parameter.dtype for parameter in first.model.parameters()} == {torch.float32}
    second = trainer(*more)
    interrupt_after(4, second, monkeypatch)
    with pytest.raises(loop.Interrupted), loop.Stop() as stop:
        second.fit(stopped, stop)
    state = checkpoint.load(stopped / "last.pt")
    assert bool(state["scaler"]) == (precision == "float16")
    third = trainer(*more)
    third.load_state(state)
    with loop.Stop() as stop:
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
