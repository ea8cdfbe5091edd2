from __future__ import annotations

import pytest

from mmixer_kernels.training.progress import Progress

RECORD = {
    "epoch": 2,
    "loss": 0.5,
    "accuracy": 0.25,
    "validation_accuracy": 0.75,
    "validation_mean_class_accuracy": 0.625,
    "seconds": 12.0,
    "data_wait": 0.125,
}


def test_without_a_terminal_it_is_one_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(epochs=10, steps=4, done=5) as progress:
        progress.step(1, 0.5, 0.25, 0.1)
        assert capsys.readouterr().err == ""
        progress.epoch(RECORD)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(
        "epoch  2/10  loss 0.5000  accuracy 25.0%  validation 75.0% (mean class 62.5%)"
        "  12.0 s, data wait 12%  ETA "
    )
    assert written.err.count("\n") == 1


def test_on_a_terminal_a_bar_has_loss_accuracy_eta_and_data_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(epochs=10, steps=4, done=5) as progress:
        progress.step(1, 0.5, 0.25, 0.1)
        progress.bar.refresh()
    text = capsys.readouterr().err
    assert "epoch 2/10  15%" in text
    for part in ("loss 0.500", "accuracy 25.0%", "data wait 10%", "ETA "):
        assert part in text
