"""The table of `--profile`: exclusive times of a step's parts, whose sum is the step's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny import trainer
from torch import Tensor, nn

from mmixer_kernels.stop import Stop
from mmixer_kernels.training.profile import BETWEEN, STEP, WARM_UP, Profile


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def profiled(steps: int, compiled: bool = False) -> tuple[Profile, nn.Module]:
    """A profile of a network that sleeps 20 ms in its extractor, and the network."""
    network = nn.Module()
    network.extractors = nn.ModuleList([Slow(0.02)])
    network.mixer = nn.Module()
    network.mixer.classifier = Slow(0)
    return Profile(steps, network, compiled), network  # type: ignore[arg-type]


def test_a_part_s_time_is_without_that_of_the_parts_inside_it() -> None:
    profile, network = profiled(steps=2)
    for _ in range(WARM_UP + 5):
        with profile.step(), profile.part("recurrence"):
            network.extractors[0](torch.ones(1))
            time.sleep(0.005)
    assert profile.timed == 2
    assert profile.seconds["extractors"] >= 2 * 0.02
    assert 2 * 0.005 <= profile.seconds["recurrence"] < profile.seconds["extractors"]
    assert profile.counts["extractors"] == profile.counts["recurrence"] == 2


def test_what_a_validation_computes_is_no_step_s() -> None:
    profile, network = profiled(steps=1)
    for _ in range(WARM_UP + 1):
        with profile.step(), profile.part("recurrence"):
            pass
    with profile.part("validation"):
        network.extractors[0](torch.ones(1))
    assert profile.seconds["validation"] >= 0.02
    assert "extractors" not in profile.seconds


def test_a_compiled_network_is_not_looked_into() -> None:
    profile, network = profiled(steps=1, compiled=True)
    for _ in range(WARM_UP + 1):
        with profile.step(), profile.part("recurrence"):
            network.extractors[0](torch.ones(1))
    assert profile.seconds["recurrence"] >= 0.02
    assert "extractors" not in profile.seconds


def test_nothing_is_timed_unless_it_is_asked_for() -> None:
    profile, network = profiled(steps=0)
    for _ in range(WARM_UP + 2):
        with profile.step(), profile.part("data"):
            network.extractors[0](torch.ones(1))
    with profile.part("checkpoint"):
        pass
    assert not profile.seconds
    assert not profile.counts


def test_the_clock_of_a_gpu_waits_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    profile, _ = profiled(steps=1)
    profile.device = torch.device("cuda", 0)
    for _ in range(WARM_UP + 1):
        with profile.step(), profile.part("data"):
            pass
    assert waited == [profile.device] * 4


def test_the_table_of_a_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = trainer("--profile", "4", "--checkpoint-steps", "4")
    with Stop() as stop:
        trained.fit(tmp_path, stop)
    table = capfd.readouterr().err.partition("part of a step")[2].splitlines()[1:]
    rows = {line[:20].strip(): line[20:].split() for line in table}
    assert list(rows) == [*STEP, "optimizer", "rest", "all", *BETWEEN]
    assert rows["all"][1:] == ["(4", "steps)"]
    assert rows["validation"][1:] == ["(2", "times)"]
    assert rows["checkpoint"][1:] == ["(5", "times)"]
    shares = [float(rows[part][1].rstrip("%")) for part in (*STEP, "optimizer", "rest")]
    assert sum(shares) == pytest.approx(100, abs=1)
    for part in ("data", "extractors", "recurrence", "backward", "optimizer"):
        assert float(rows[part][0]) > 0, part


def test_a_training_that_is_over_too_soon_says_so() -> None:
    profile, _ = profiled(steps=1)
    assert "no step was timed" in str(profile)
