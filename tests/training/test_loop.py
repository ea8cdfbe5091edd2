from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import outcome, unequal
from tiny import STEPS, interrupt_after, trainer
from torch import Tensor, nn

from mmixer_kernels.data import Sample, Split
from mmixer_kernels.errors import UserError
from mmixer_kernels.stop import Interrupted, Stop
from mmixer_kernels.training import checkpoint, loop
from mmixer_kernels.training.options import LoaderOptions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Stop() as stop:
        trainer().fit(folder, stop)
    return folder


def assert_resumes(folder: Path, uninterrupted: Path) -> None:
    """A training that goes on from the folder's last.pt ends as the one that was left alone."""
    resumed = trainer()
    resumed.load_state(checkpoint.load(folder / "last.pt"))
    with Stop() as stop:
        resumed.fit(folder, stop)
    assert unequal(outcome(folder), outcome(uninterrupted)) == []


def test_the_same_command_twice_gives_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    with Stop() as stop:
        trainer().fit(tmp_path, stop)
    assert unequal(outcome(tmp_path), outcome(uninterrupted)) == []


def test_a_checkpoint_has_the_names_that_other_versions_read(uninterrupted: Path) -> None:
    state = checkpoint.load(uninterrupted / "last.pt")
    assert set(state) == {
        *("format", "config", "data", "processes", "model", "optimizer", "scaler", "random"),
        *("random_cuda", "threads", "hardware", "epoch", "step", "totals", "history"),
    }
    assert set(state["totals"]) == {"loss", "rights", "samples", "seconds", "data_seconds"}
    best = checkpoint.load(uninterrupted / "best.pt")
    assert set(best) == {"format", "config", "data", "model", "epoch"}


def test_another_seed_gives_other_weights(uninterrupted: Path, tmp_path: Path) -> None:
    with Stop() as stop:
        trainer("--seed", "1").fit(tmp_path, stop)
    ours, theirs = (checkpoint.load(p / "last.pt")["model"] for p in (tmp_path, uninterrupted))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("steps", [1, 3, STEPS, STEPS + 1, 2 * STEPS])
def test_interrupted_and_resumed_is_bit_equal(
    uninterrupted: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer()
    interrupt_after(steps, first, monkeypatch)
    with pytest.raises(Interrupted), Stop() as stop:
        first.fit(tmp_path, stop)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["epoch"] * STEPS + state["step"] == steps
    torch.rand(steps)
    assert_resumes(tmp_path, uninterrupted)


def test_balanced_sampling_is_resumed_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed() -> loop.Trainer:
        trained = trainer("--loader.sampling", "balanced")
        trained.data.train.labels = torch.tensor([0] * 11 + [1] * 4 + [2])
        return trained

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    with Stop() as stop:
        skewed().fit(whole, stop)
    first = skewed()
    interrupt_after(STEPS + 2, first, monkeypatch)
    with pytest.raises(Interrupted), Stop() as stop:
        first.fit(stopped, stop)
    resumed = skewed()
    resumed.load_state(checkpoint.load(stopped / "last.pt"))
    assert (resumed.epoch, resumed.step) == (1, 2)
    with Stop() as stop:
        resumed.fit(stopped, stop)
    assert unequal(outcome(stopped), outcome(whole)) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer.extractor-rate", "0.001", "--model.gradient-checkpointing"),
        ("--optimizer.extractor-rate", "0", "--optimizer.weight-decay", "0.1"),
    ],
)
def test_extractors_with_a_rate_of_their_own_resume_to_the_same_bits(
    tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ("--optimizer.accumulate", "2", "--optimizer.clip-norm", "1", *options)
    first = trainer(*more)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    for folder in (whole, stopped):
        folder.mkdir()
    with Stop() as stop:
        first.fit(whole, stop)
    frozen = options[1] == "0"
    for name, value in first.model.state_dict().items():
        kept = frozen and name.startswith("extractors.")
        assert torch.equal(value, before[name]) == kept, name
    second = trainer(*more)
    interrupt_after(2, second, monkeypatch)
    with pytest.raises(Interrupted), Stop() as stop:
        second.fit(stopped, stop)
    resumed = trainer(*more)
    resumed.load_state(checkpoint.load(stopped / "last.pt"))
    with Stop() as stop:
        resumed.fit(stopped, stop)
    assert unequal(outcome(stopped), outcome(whole)) == []


def test_the_extractors_rate_alone_decides_where_they_go(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """The learning rate given again for them changes nothing."""
    with Stop() as stop:
        trainer("--optimizer.extractor-rate", "0.01").fit(tmp_path, stop)
    ours, theirs = (checkpoint.load(p / "last.pt")["model"] for p in (tmp_path, uninterrupted))
    assert unequal(ours, theirs) == []


def test_a_training_killed_between_its_writes_resumes_without_doubled_lines(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer()
    inner = checkpoint.save

    def save(state: dict[str, Any], path: Path, *previous: Path) -> None:
        if path.name == "last.pt" and state["epoch"] == 2:
            raise MemoryError
        inner(state, path, *previous)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(MemoryError), Stop() as stop:
        first.fit(tmp_path, stop)
    monkeypatch.undo()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')
    assert_resumes(tmp_path, uninterrupted)


def test_a_signal_during_validation_stops_there(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer()
    inner = loop.evaluate

    def evaluate(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return inner(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Interrupted) as stopped, Stop() as stop:
        first.fit(tmp_path, stop)
    assert stopped.value.number == signal.SIGTERM
    monkeypatch.undo()
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["epoch"], state["step"]) == (0, STEPS)
    assert_resumes(tmp_path, uninterrupted)


def test_each_epoch_has_draws_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    trained = trainer()
    monkeypatch.setattr(trained.data.train, "set_epoch", epochs.append)
    with Stop() as stop:
        trained.fit(tmp_path, stop)
    assert epochs == [0, 1]


def test_workers_change_no_result(uninterrupted: Path, tmp_path: Path) -> None:
    with Stop() as stop:
        trainer("--loader.workers", "2").fit(tmp_path, stop)
    ours, theirs = outcome(tmp_path), outcome(uninterrupted)
    for name in ("last", "best"):
        assert ours[name].pop("config") != theirs[name].pop("config")
    assert unequal(ours, theirs) == []


@pytest.mark.parametrize("broken_epoch", [1, 2])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoints(
    tmp_path: Path, broken_epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer()
    inner = trained.model.forward

    def forward(inputs: list[Tensor], lengths: Tensor | None = None) -> Tensor:
        broken = trained.epoch + 1 == broken_epoch and trained.step == 2
        return inner(inputs, lengths) * (math.nan if broken else 1)

    monkeypatch.setattr(trained.model, "forward", forward)
    message = rf"loss is nan in epoch {broken_epoch} at step 3 of {STEPS}: lower --optimizer"
    with pytest.raises(UserError, match=message), Stop() as stop:
        trained.fit(tmp_path, stop)
    assert (tmp_path / "last.pt").exists() == (broken_epoch == 2)
    if broken_epoch == 2:
        assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer()
    inner = trained.optimizer.step

    def step() -> None:
        inner()
        if trained.step == STEPS - 1:
            nn.init.constant_(trained.model.mixer.classifier.bias, math.nan)

    monkeypatch.setattr(trained.optimizer, "step", step)
    with pytest.raises(UserError, match="validation loss is nan in epoch 1"), Stop() as stop:
        trained.fit(tmp_path, stop)
    assert not (tmp_path / "last.pt").exists()


def test_the_best_epoch_breaks_ties_by_loss_then_by_order() -> None:
    trained = trainer()
    trained.history = [
        {"epoch": epoch, "validation_accuracy": accuracy, "validation_loss": loss}
        for epoch, accuracy, loss in [
            (1, 0.5, 0.1),
            (2, 0.75, 0.9),
            (3, 0.75, 0.8),
            (4, 0.75, 0.8),
            (5, 0.5, 0.0),
        ]
    ]
    assert trained.best()["epoch"] == 3


def test_a_validation_comes_every_so_many_epochs_and_after_the_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainings = []
    for often in ("3", "1"):
        trainings.append(trainer("--epochs", "4", "--validate-every", often))
        (tmp_path / often).mkdir()
        with Stop() as stop:
            trainings[-1].fit(tmp_path / often, stop)
    trained, every = trainings
    validated = [record["epoch"] for record in trained.history if "validation_loss" in record]
    assert validated == [3, 4]
    assert trained.best()["epoch"] in validated
    line = capfd.readouterr().err.splitlines()[0]
    assert line.startswith("epoch 1/4")
    assert "validation" not in line
    states = trained.model.state_dict(), every.model.state_dict()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


class Answers(Split):
    """Samples that carry the logits to answer with."""

    def __init__(self, labels: list[int], answers: list[int]) -> None:
        super().__init__(torch.tensor(labels))
        self.answers = answers

    def __getitem__(self, index: int) -> Sample:
        logits = torch.nn.functional.one_hot(torch.tensor(self.answers[index]), 3).float()
        return Sample((logits,), int(self.labels[index]), 3)


class Echo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list[Tensor], lengths: Tensor | None) -> Tensor:
        return inputs[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_every_sample_once(batch_size: int, workers: int) -> None:
    split = Answers([0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0, 2])
    evaluation = loop.evaluate(Echo(), split, 3, LoaderOptions(batch_size, workers))
    assert evaluation.confusion.tolist() == [[1, 1, 0], [0, 2, 1], [1, 0, 1]]
    right, wrong = (math.log(math.e + 2) - hit for hit in (1, 0))
    assert evaluation.loss == pytest.approx((4 * right + 3 * wrong) / 7)
