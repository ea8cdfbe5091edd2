import math

import pytest

from mmixer_kernels.experiments.seeds import Lead, lead, over_folds, over_seeds, pooled


def test_a_seeds_value_is_the_mean_of_its_folds():
    values = {(0, 0): 0.8, (0, 1): 0.6, (1, 0): 0.9, (1, 1): 0.9}
    spread = over_seeds(values)
    assert spread.mean == pytest.approx(0.8)
    assert spread.deviation == pytest.approx(0.2 / math.sqrt(2))
    assert str(spread) == "80.00 ± 14.14"
    assert over_folds(values) == {0: pytest.approx(0.85), 1: pytest.approx(0.75)}
    assert str(over_seeds({(3, None): 0.5})) == "50.00"


def test_a_lead_is_of_the_same_trainings():
    """Seeds 1, 2 and 3 points ahead: mean 2, error 1/sqrt(3), times t = 4.30."""
    first = {(seed, None): 0.5 + 0.1 * seed for seed in range(3)}
    second = {(seed, None): value - 0.01 * (seed + 1) for (seed, _), value in first.items()}
    found = lead(first, second)
    assert found.mean == pytest.approx(0.02)
    assert found.margin == pytest.approx(4.30 * 0.01 / math.sqrt(3))
    assert str(found) == "+2.00 ± 2.48"


def test_folds_are_the_units_where_there_are_folds():
    """Two seeds that agree are not two more witnesses."""
    first = {(seed, fold): 0.5 + 0.01 * fold for seed in range(2) for fold in range(5)}
    second = {trained: 0.5 for trained in first}
    error = math.sqrt(sum((0.01 * fold - 0.02) ** 2 for fold in range(5)) / 4) / math.sqrt(5)
    assert lead(first, second).margin == pytest.approx(2.78 * error)


@pytest.mark.parametrize(
    ("mean", "margin", "words"),
    [
        (0.02, 0.01, "ahead"),
        (0.01, 0.02, "ahead, within the noise"),
        (0.0, 0.02, "equal"),
        (-0.01, 0.02, "behind, within the noise"),
        (-0.02, 0.01, "behind"),
        (-0.02, None, "behind in the one training"),
    ],
)
def test_verdicts(mean, margin, words):
    assert Lead(mean, margin).verdict() == words


def test_other_numbers_of_seeds_take_the_next_smaller_ones_quantile():
    first = {(seed, None): 0.01 * (seed % 2) for seed in range(12)}  # 11 degrees of freedom: 10's
    second = dict.fromkeys(first, 0.0)
    error = 0.01 * math.sqrt(12 * 0.25 / 11) / math.sqrt(12)
    assert lead(first, second).margin == pytest.approx(2.23 * error)


def test_classes_without_samples_do_not_count():
    assert pooled([1.0, None, 0.5]) == 0.75
    assert pooled([None]) is None
