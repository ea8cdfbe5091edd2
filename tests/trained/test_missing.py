"""Samples with one modality absent or noised, and a network's accuracy on them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmixer_kernels.data import Sample, Split
from mmixer_kernels.trained.missing import Degraded, describe, deviations, evaluate
from mmixer_kernels.training import loop
from mmixer_kernels.training.options import LoaderOptions

CLASSES, STEPS = 4, 6
CONSTANT = 1234.567  # its squares' sums are rounded
LOADER = LoaderOptions(batch_size=5)


class Clips(Split):
    """Padded samples of which `one` shows the class, `two` is random and `three` never changes."""

    def __init__(self, samples: int = 64) -> None:
        super().__init__(torch.arange(samples) % CLASSES)

    def __getitem__(self, index: int) -> Sample:
        length = 1 + index % STEPS
        random = np.random.default_rng(index)
        one = nn.functional.one_hot(self.labels[index], CLASSES).float().expand(STEPS, CLASSES)
        two = torch.from_numpy(random.normal(3, 2, (STEPS, 50, 20)).astype(np.float32))
        valid = (torch.arange(STEPS) < length).float()[:, None]
        inputs = (one * valid, two * valid[:, None], torch.full((STEPS, 3), CONSTANT) * valid)
        return Sample(inputs, int(self.labels[index]), length)


class KnowsOne(nn.Module):
    """Scores that are the first modality's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, inputs: list[Tensor], lengths: Tensor | None) -> Tensor:
        return self.scale * inputs[0].mean(1)


def valid_values(split: Split, modality: int) -> Tensor:
    samples = [split[index] for index in range(len(split))]
    return torch.cat([x.inputs[modality][: x.length].flatten() for x in samples])


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("noise", [None, 2.0])
def test_one_modality_is_degraded_and_nothing_else(modality: int, noise: float | None) -> None:
    split = Clips()
    degraded = Degraded(split, modality, noise)
    assert torch.equal(degraded.labels, split.labels)
    for index in range(len(split)):
        before, after = split[index], degraded[index]
        assert (after.label, after.length) == (before.label, before.length)
        for place, (x, y) in enumerate(zip(before.inputs, after.inputs, strict=True)):
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            if place != modality:
                assert torch.equal(x, y)
            elif noise is None:
                assert not y.any()
            else:
                assert (x[: after.length] != y[: after.length]).all()
                assert not y[after.length :].any()


def test_absent_is_zero_even_where_the_sensor_gave_no_number() -> None:
    class Broken(Clips):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return sample._replace(inputs=(sample.inputs[0] * torch.nan, *sample.inputs[1:]))

    assert not Degraded(Broken(), 0, None)[3].inputs[0].any()


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_noise_is_white_with_its_deviation(noise: float) -> None:
    split = Clips()
    added = valid_values(Degraded(split, 1, noise), 1) - valid_values(split, 1)
    assert len(added) > 50_000
    assert added.mean().abs() < 0.02 * noise
    assert added.std() == pytest.approx(noise, rel=0.02)
    assert torch.corrcoef(torch.stack([added[1:], added[:-1]]))[0, 1].abs() < 0.02


def test_the_splits_own_tensors_stay() -> None:
    sample = Clips()[5]
    split = [sample]
    degraded = Degraded(Clips(1), 1, 1.0)
    degraded.split = split  # type: ignore[assignment]
    before = sample.inputs[1].clone()
    assert not torch.equal(degraded[0].inputs[1], before)
    assert torch.equal(sample.inputs[1], before)


def test_noise_repeats_and_differs_by_index_and_modality() -> None:
    split = Clips()
    first = Degraded(split, 1, 1.0)
    again = pickle.loads(pickle.dumps(first))
    for index in reversed(range(len(split))):
        assert torch.equal(again[index].inputs[1], first[index].inputs[1])

    def draws(modality: int, index: int) -> set[float]:
        """The first step's noise on zeros, whatever the modality's own values."""
        blank = Sample((torch.zeros(STEPS, 50),) * 2, 0, STEPS)
        degraded = Degraded(split, modality, 1.0)
        degraded.split = [blank] * len(split)  # type: ignore[assignment]
        return set(degraded[index].inputs[modality].flatten().tolist())

    assert len(draws(0, 3)) == 50 * STEPS
    for other in ((1, 3), (0, 4)):
        assert not draws(0, 3) & draws(*other)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_deviations_are_those_of_the_valid_steps(batch_size: int) -> None:
    split = Clips()
    found = deviations(split, LoaderOptions(batch_size=batch_size))
    for modality in (0, 1):
        values = valid_values(split, modality).double()
        assert found[modality] == pytest.approx(values.std(correction=0).item(), rel=1e-12)
    assert found[2] == 0
    noised = Degraded(split, 2, 2 * found[2])
    assert torch.equal(noised[5].inputs[2], split[5].inputs[2])


def test_a_network_is_hurt_by_the_loss_of_what_it_knows_alone() -> None:
    split, names = Clips(), ("one", "two", "three")
    found = evaluate(KnowsOne(), split, names, CLASSES, LOADER)
    whole = {"accuracy": 1.0, "mean_class_accuracy": 1.0}
    for name in names:
        assert list(found[name]["noise"]) == ["0.5", "1", "2"]
    for cases in (found["two"], found["three"]):
        for summary in (cases["absent"], *cases["noise"].values()):
            assert summary.items() >= whole.items()
            assert summary == cases["absent"]
    absent = found["one"]["absent"]
    assert absent["accuracy"] == 1 / CLASSES
    assert absent["loss"] == pytest.approx(np.log(CLASSES))
    deviation = valid_values(split, 0).double().std(correction=0).item()
    for level, summary in found["one"]["noise"].items():
        noised = Degraded(split, 0, float(level) * deviation)
        expected = loop.evaluate(KnowsOne(), noised, CLASSES, LOADER).loss
        assert summary["loss"] == pytest.approx(expected, rel=1e-6)
    losses = [summary["loss"] for summary in found["one"]["noise"].values()]
    assert losses == sorted(losses)
    assert 1 > found["one"]["noise"]["2"]["accuracy"] > absent["accuracy"]


def test_table_has_a_row_a_modality() -> None:
    cases = {"absent": {"accuracy": 0.25}, "noise": {k: {"accuracy": 0.5} for k in "abc"}}
    lines = describe({"accuracy": 1.0, "missing": {"rgb": cases, "depth": cases}}).splitlines()
    assert lines[0].split("  ")[0] == "accuracy"
    assert [line.split() for line in lines[1:]] == [
        [name, "100.00%", "25.00%", "50.00%", "50.00%", "50.00%"] for name in ("rgb", "depth")
    ]
    assert len(set(map(len, lines))) == 1
