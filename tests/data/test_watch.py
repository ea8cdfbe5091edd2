import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from mmixer_kernels import train
from mmixer_kernels.data import WatchOptions, collate, watch
from mmixer_kernels.training import parsing

PLAIN = {"tempo": 1.0, "mirror": 0.0, "tilt": 0.0, "roll": 0.0, "gain": 0.0, "jitter": 0.0}


@pytest.fixture(scope="module")
def recordings():
    return watch._read()


@pytest.fixture
def load(recordings, monkeypatch):
    monkeypatch.setattr(watch, "_read", lambda: recordings)

    def load(seed=0, **options):
        return WatchOptions(**options).load(None, seed)

    return load


def window(sample):
    return torch.cat(sample.inputs, 1).double().numpy()


def test_people_do_not_cross_splits(recordings, load):
    data = load()
    subjects = [
        {recording.subject for recording in split.recordings}
        for split in (data.train, data.validation, data.test)
    ]
    assert subjects == [{1, 2, 3, 5, 6, 7}, {4}, {8, 9, 10}]
    assert {r.subject for r in load(validation_subject=2).validation.recordings} == {2}
    data = load(validation_subject=None)
    for split in (data.train, data.validation):
        assert {recording.subject for recording in split.recordings} == set(range(1, 8))
    assert len(data.validation) == 1522
    data = load(test_subjects=(9, 2))
    subjects = [
        {recording.subject for recording in split.recordings}
        for split in (data.train, data.validation, data.test)
    ]
    assert subjects == [{1, 3, 5, 6, 7, 8, 10}, {4}, {2, 9}]
    assert len(recordings) == 140
    assert all(recording.signal.shape[1] == 6 for recording in recordings)


def test_the_validation_subject_has_the_shortest_recordings(recordings):
    steps = {subject: 0 for subject in watch.SUBJECTS}
    for recording in recordings:
        steps[recording.subject] += len(recording.signal)
    assert min(steps, key=steps.get) == WatchOptions().validation_subject


def test_evaluation_has_every_window_once(load):
    data = load()
    for split in (data.validation, data.test):
        index = 0
        for recording in split.recordings:
            for start in range(0, len(recording.signal) - 199, 100):
                sample = split[index]
                expected = recording.signal[start : start + 200] / split.scale
                np.testing.assert_allclose(window(sample), expected, rtol=1e-5)
                assert sample.label == recording.label == split.labels[index]
                assert sample.length == 200
                index += 1
        assert index == len(split)
        assert set(split.labels.tolist()) == set(range(7))


def test_signals_are_normalised_by_training_subjects_alone(recordings, load, monkeypatch):
    data = load()
    signal = np.concatenate([recording.signal for recording in data.train.recordings])
    signal = signal.astype(np.float64) / data.train.scale
    np.testing.assert_allclose(np.square(signal[:, :3]).mean(), 1)
    np.testing.assert_allclose(np.square(signal[:, 3:]).mean(), 1)
    louder = [
        r._replace(signal=r.signal * (5 if r.subject in (4, 8, 9, 10) else 1)) for r in recordings
    ]
    monkeypatch.setattr(watch, "_read", lambda: louder)
    np.testing.assert_array_equal(load().test.scale, data.train.scale)


def test_training_windows_are_drawn_anew_each_epoch(load):
    data, again, other = load(), load(), load(seed=1)
    first = window(data.train[3])
    assert np.array_equal(first, window(again.train[3]))
    assert not np.array_equal(first, window(other.train[3]))
    numbers, labels = data.train.numbers.copy(), data.train.labels.clone()
    data.train.set_epoch(1)
    assert not np.array_equal(numbers, data.train.numbers)
    data.train.numbers[3] = numbers[3]
    assert not np.array_equal(first, window(data.train[3]))
    data.train.set_epoch(0)
    assert np.array_equal(numbers, data.train.numbers)
    assert torch.equal(labels, data.train.labels)
    assert np.array_equal(first, window(data.train[3]))
    before = window(data.test[3])
    data.test.set_epoch(1)
    assert np.array_equal(before, window(data.test[3]))


def test_an_epoch_draws_recordings_by_their_length(load):
    assert len(load().train) == 1280
    train = load(samples=100_000).train
    lengths = np.array([len(recording.signal) for recording in train.recordings])
    expected = len(train) * lengths / lengths.sum()
    drawn = np.bincount(train.numbers, minlength=len(lengths))
    deviation = (drawn - expected) / np.sqrt(expected)
    assert 0.8 < deviation.std() < 1.2
    assert train.labels.tolist() == [train.recordings[number].label for number in train.numbers]


def test_a_plain_window_is_a_stretch_of_its_own_recording(recordings, load, monkeypatch):
    steps = [
        r._replace(signal=1e4 * number + np.arange(len(r.signal))[:, None].repeat(6, 1))
        for number, r in enumerate(recordings)
    ]
    monkeypatch.setattr(watch, "_read", lambda: steps)
    train = load(**PLAIN).train
    train.scale = np.ones(6)
    starts = []
    for index in range(0, len(train), 7):
        recording = train.recordings[train.numbers[index]]
        drawn = window(train[index])
        np.testing.assert_allclose(np.diff(drawn, axis=0), 1, atol=0.2)
        assert recording.signal[0, 0] - 0.1 <= drawn[0, 0]
        assert drawn[-1, 0] <= recording.signal[-1, 0] + 0.1
        assert train[index].label == recording.label
        room = len(recording.signal) - 200
        starts.append((drawn[0, 0] - recording.signal[0, 0]) / room)
    assert 0.4 < np.mean(starts) < 0.6
    assert max(starts) > 0.95


@pytest.mark.parametrize("change", [{"tilt": 40.0}, {"roll": 40.0}])
def test_both_sensors_turn_together(load, change):
    plain, turned = load(**PLAIN).train, load(**{**PLAIN, **change}).train
    for index in range(0, 500, 100):
        before, after = (window(split[index]).reshape(-1, 2, 3) for split in (plain, turned))
        assert np.abs(after - before).max() > 0.05
        products = before @ before.transpose(0, 2, 1)
        np.testing.assert_allclose(after @ after.transpose(0, 2, 1), products, atol=1e-4)
        moved = np.abs(after[..., 0] - before[..., 0]).max()
        assert (moved < 1e-5) == ("roll" in change)


def test_mirrored_windows_are_of_the_other_arm(load):
    plain, mirrored = load(**PLAIN).train, load(**{**PLAIN, "mirror": 1.0}).train
    np.testing.assert_allclose(window(mirrored[5]), window(plain[5]) * (-1, 1, 1, 1, -1, -1))


def test_same_arm_mirrors_one_arms_recordings_in_every_split(recordings, load):
    both, same = load(**PLAIN), load(same_arm=True, **PLAIN)
    assert {recording.arm for recording in recordings} == {0, 1}
    for split in ("train", "validation", "test"):
        pairs = list(
            zip(getattr(both, split).recordings, getattr(same, split).recordings, strict=True)
        )
        for before, after in pairs:
            turned = (-1, 1, 1, 1, -1, -1) if before.arm == 1 else 1
            np.testing.assert_array_equal(after.signal, before.signal * turned)
            assert (after.label, after.subject, after.arm) == (before.label, before.subject, 0)
    # Hanging arms: gravity is along x, with the arm's own sign in the recordings.
    hanging = [r for r in same.train.recordings if watch.CLASSES[r.label] == "pendulum"]
    assert {np.sign(r.signal[:, 0].mean()) for r in hanging} == {1.0}


def test_gain_is_one_a_sensor(load):
    plain, louder = load(**PLAIN).train, load(**{**PLAIN, "gain": 0.3}).train
    gains = np.median(window(louder[5]) / window(plain[5]), axis=0)
    np.testing.assert_allclose(gains, gains[[0, 0, 0, 3, 3, 3]], rtol=1e-5)
    assert len({1, *gains[[0, 3]].round(4)}) == 3


def test_jitter_is_as_wide_as_asked(load):
    plain, noisy = load(**PLAIN).train, load(**{**PLAIN, "jitter": 0.5}).train
    assert 0.45 < (window(noisy[5]) - window(plain[5])).std() < 0.55


@pytest.mark.parametrize("tempo", [0.8, 1.0, 1.25])
def test_tempo_shows_as_speed_and_stays_in_the_recording(tempo):
    ramp = np.arange(300.0)[:, None].repeat(6, 1)
    random = np.random.default_rng(0)
    windows = [watch._stretched(ramp, tempo, random) for _ in range(200)]
    for drawn in windows:
        np.testing.assert_allclose(np.diff(drawn, axis=0), tempo)
    assert 0 <= min(drawn[0, 0] for drawn in windows) < 2
    assert 297 < max(drawn[-1, 0] for drawn in windows) <= 299


def test_rotation_is_the_exponential_of_its_cross_product():
    degrees = np.array([30.0, -50.0, 20.0])
    x, y, z = np.radians(degrees)
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    expected = torch.linalg.matrix_exp(cross).numpy()
    np.testing.assert_allclose(watch._rotation(degrees), expected, atol=1e-14)
    np.testing.assert_array_equal(watch._rotation(np.zeros(3)), np.eye(3))


def test_extractors_take_batches(load):
    data = load()
    batch = collate([data.train[i] for i in range(3)])
    assert batch.lengths is None
    assert data.modalities == ("accelerometer", "gyroscope")
    assert len(data.classes) == 7
    for extract, inputs, size in zip(
        data.extractors, batch.inputs, data.feature_sizes, strict=True
    ):
        assert inputs.shape == (3, 200, 3)
        assert inputs.dtype == torch.float32
        assert extract(inputs).shape == (3, 13, size)


@pytest.mark.parametrize(("stride", "steps"), [(1, 50), (2, 25), (4, 13)])
def test_the_stride_sets_the_number_of_steps(load, stride, steps):
    data = load(stride=stride)
    batch = collate([data.test[i] for i in range(2)])
    assert data.extractors[0](batch.inputs[0]).shape == (2, steps, 64)


def test_five_folds_by_subject_test_every_window_once(load):
    folds = [
        load(test_subjects=(first, first + 1), validation_subject=None) for first in range(1, 11, 2)
    ]
    whole = load(validation_subject=None)
    assert sum(len(fold.test) for fold in folds) == len(whole.train.plain()) + len(whole.test)
    for fold in folds:
        assert {len(s) for s in (_subjects(fold.train), _subjects(fold.test))} == {8, 2}
        assert not _subjects(fold.train) & _subjects(fold.test)


def _subjects(split):
    return {recording.subject for recording in split.recordings}


@pytest.mark.parametrize("split", ["train", "test"])
def test_modalities_divide_the_same_window(load, split):
    expected = torch.cat(getattr(load(), split)[7].inputs, 1)
    axes = getattr(load(modalities="axes"), split)[7].inputs
    assert [tuple(axis.shape) for axis in axes] == [(200, 1)] * 6
    assert torch.equal(torch.cat(axes, 1), expected)
    gravity, linear, gyroscope = getattr(load(modalities="gravity"), split)[7].inputs
    assert torch.equal(gyroscope, expected[:, 3:])
    torch.testing.assert_close(gravity + linear, expected[:, :3])
    acceleration = expected[:, :3].double()
    for step, (first, last) in {0: (0, 26), 10: (0, 36), 100: (75, 126), 199: (174, 200)}.items():
        mean = acceleration[first:last].mean(0).float()
        torch.testing.assert_close(gravity[step], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("modalities", "channels"), [("gravity", [3, 3, 3]), ("axes", [1] * 6)])
def test_extractors_follow_the_modalities(load, modalities, channels):
    data = load(modalities=modalities)
    batch = collate([data.train.plain()[i] for i in range(2)])
    assert [inputs.shape[2] for inputs in batch.inputs] == channels
    assert len(data.modalities) == len(set(data.modalities)) == len(channels)
    for extract, inputs, size in zip(
        data.extractors, batch.inputs, data.feature_sizes, strict=True
    ):
        assert extract(inputs).shape == (2, 13, size)


def test_the_recipe_is_1200_steps_and_the_last_weights():
    run = parsing.parse(["--data", "watch"], "train").run
    assert run.epochs * WatchOptions().samples == 1200 * run.loader.batch_size
    assert run.optimizer.warmup_epochs * WatchOptions().samples == 50 * run.loader.batch_size
    assert run.select == "last"


def test_seglearn_is_read_but_not_imported(recordings):
    assert recordings
    assert "seglearn" not in sys.modules


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, capsys):
    inner = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "seglearn" else inner(name, *rest),
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmixer_kernels\[watch\]'"):
        WatchOptions().load(None, 0)
    assert train.main(["--data", "watch", "--output", str(tmp_path / "run")]) == 2
    device, error = capsys.readouterr().err.splitlines()
    assert device.startswith("device ")
    assert error.startswith("error: the data set watch is read from the package seglearn")
    assert not (tmp_path / "run").exists()


def test_a_short_run_tests_its_last_weights(tmp_path):
    arguments = ["--data", "watch", "--epochs", "2", "--samples", "64", "--model.hidden-size", "8"]
    assert train.main([*arguments, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["checkpoint"], result["epoch"]) == ("last.pt", 2)
    assert result["samples"] == 707


def test_a_short_run_of_a_fold_with_six_modalities(tmp_path):
    arguments = ["--data", "watch", "--epochs", "1", "--samples", "32", "--model.hidden-size", "8"]
    fold = ["--test-subjects", "1", "2", "--validation-subject", "None", "--modalities", "axes"]
    assert train.main([*arguments, *fold, "--output", str(tmp_path)]) == 0
    expected = WatchOptions((1, 2), None, "axes", samples=32)
    assert parsing.parse(["--config", str(tmp_path / "config.toml")], "train").data == expected
    windows = len(expected.load(None, 0).test)
    assert json.loads((tmp_path / "result.json").read_text())["samples"] == windows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"validation_subject": 8},
            r"not tested on \(1, 2, 3, 4, 5, 6, 7\) or None, but is 8: choose another or None",
        ),
        ({"test_subjects": (3, 4)}, r"\(1, 2, 5, 6, 7, 8, 9, 10\) or None, but is 4: choose"),
        ({"test_subjects": (0, 1)}, r"test_subjects must be one or more of 1..10, .*is 0, 1"),
        ({"test_subjects": (5, 5)}, r"test_subjects must be .* each of them once, but is 5, 5"),
        ({"test_subjects": ()}, "test_subjects must be one or more of .* but is empty"),
        (
            {"test_subjects": (1, 2, 3, 5, 6, 7, 8, 9, 10)},
            r"leave someone to train on, but are 1, 2, 3, 5, 6, 7, 8, 9, 10; None; and 4",
        ),
        (
            {"test_subjects": tuple(range(1, 11)), "validation_subject": None},
            "must leave someone to train on",
        ),
        (
            {"exclude_subjects": (8, 11)},
            r"exclude_subjects must be of 1..10 without those tested on, but are 8, 11",
        ),
        (
            {"exclude_subjects": (1, 2, 3), "validation_subject": 2},
            r"not tested on \(4, 5, 6, 7\) or None, but is 2",
        ),
        ({"modalities": "all"}, "modalities must be one of sensors, gravity, axes, but is 'all'"),
        ({"samples": 0}, "samples must be 1 or more, but is 0"),
        ({"stride": 0}, "stride must be 1 or more, but is 0"),
        ({"tempo": 0.9}, r"tempo must be in 1..4, but is 0.9"),
        ({"mirror": 1.5}, r"mirror must be in 0..1, but is 1.5"),
        ({"gain": float("inf")}, "gain must be 0 or more and finite, but is inf"),
        ({"tilt": -1.0}, r"tilt must be 0 or more and finite, but is -1.0"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WatchOptions(), **change).load(None, 0)


def test_a_root_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root must be left out for watch"):
        WatchOptions().load(tmp_path, 0)


def test_people_who_are_excluded_are_in_no_split():
    data = WatchOptions(
        test_subjects=(1, 2), exclude_subjects=(3, 4, 9), validation_subject=5
    ).load(None, 0)
    splits = {"train": data.train.plain(), "validation": data.validation, "test": data.test}
    found = {
        name: {recording.subject for recording in split.recordings}
        for name, split in splits.items()
    }
    assert found == {"train": {6, 7, 8, 10}, "validation": {5}, "test": {1, 2}}
