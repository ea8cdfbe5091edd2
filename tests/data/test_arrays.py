import zipfile

import numpy as np
import pytest
import torch

from mmixer_kernels.data import ArraysOptions, collate
from mmixer_kernels.data import arrays as arrays_module

CLASSES, STEPS = 3, 5


def content(samples=30, **changes):
    random = np.random.default_rng(samples)
    arrays = {
        "skeleton": random.standard_normal((samples, STEPS, 4)),
        "audio": random.standard_normal((samples, STEPS, 2), dtype=np.float32),
        "label": np.arange(samples) % CLASSES,
        **changes,
    }
    return {key: array for key, array in arrays.items() if array is not None}


def save(root, train=None, test=None, validation=None):
    np.savez(root / "train.npz", **(train or content()))
    np.savez(root / "test.npz", **(test or content(9)))
    if validation:
        np.savez(root / "validation.npz", **validation)


def load(root, **options):
    return ArraysOptions(**options).load(root, seed=0)


def stacked(split, modality):
    return torch.stack([split[i].inputs[modality] for i in range(len(split))])


def test_features_come_as_they_are_where_they_are_not_standardized(tmp_path):
    train, test, validation = content(), content(9), content(6)
    save(tmp_path, train, test, validation)
    data = load(tmp_path, standardize=False)
    assert data.modalities == ("skeleton", "audio")
    assert data.classes == ("0", "1", "2")
    assert data.feature_sizes == (4, 2)
    splits = ((data.train, train), (data.test, test), (data.validation, validation))
    for split, arrays in splits:
        assert split.labels.tolist() == arrays["label"].tolist()
        for modality, name in enumerate(data.modalities):
            expected = torch.tensor(arrays[name], dtype=torch.float32)
            assert torch.equal(stacked(split, modality), expected)
            assert torch.equal(data.extractors[modality](expected), expected)
        assert split[1].label == 1
        assert split[1].length == STEPS


def test_modalities_are_matched_by_name(tmp_path):
    test = content(9)
    save(tmp_path, test=dict(reversed(test.items())))
    data = load(tmp_path, standardize=False)
    expected = torch.tensor(test["skeleton"], dtype=torch.float32)
    assert torch.equal(stacked(data.test, 0), expected)


def test_padding_is_not_read(tmp_path):
    lengths = np.arange(30) % STEPS + 1
    arrays = content(length=lengths)
    for name in ("skeleton", "audio"):
        arrays[name][np.arange(STEPS) >= lengths[:, None]] = np.nan
    save(tmp_path, arrays, validation=content(6))
    for standardize in (False, True):
        data = load(tmp_path, standardize=standardize)
        batch = collate([data.train[i] for i in range(30)])
        assert batch.lengths.tolist() == lengths.tolist()
        assert all(x.isfinite().all() for x in batch.inputs)


def test_files_may_differ_in_steps(tmp_path):
    test = content(9)
    save(tmp_path, test={key: a if key == "label" else a[:, :2] for key, a in test.items()})
    assert load(tmp_path).test[0].length == 2


def test_classes_can_be_named(tmp_path):
    save(tmp_path, content(classes=np.array(["sit", "stand", "fall"])))
    assert load(tmp_path).classes == ("sit", "stand", "fall")


def test_named_classes_need_no_sample(tmp_path):
    save(tmp_path, content(classes=np.array(["sit", "stand", "fall", "jump"])))
    assert load(tmp_path).classes == ("sit", "stand", "fall", "jump")


def identities(split):
    return {tuple(split[i].inputs[0].flatten().tolist()) for i in range(len(split))}


def test_validation_is_held_out_of_training(tmp_path):
    save(tmp_path, content(60))
    data = load(tmp_path, validation_share=0.2)
    assert data.train.labels.bincount().tolist() == [16, 16, 16]
    assert data.validation.labels.bincount().tolist() == [4, 4, 4]
    assert len(identities(data.train) | identities(data.validation)) == 60
    again = load(tmp_path, validation_share=0.2)
    assert identities(data.validation) == identities(again.validation)
    other = ArraysOptions(validation_share=0.2).load(tmp_path, seed=1)
    assert identities(data.validation) != identities(other.validation)


@pytest.mark.parametrize(("share", "held"), [(0.001, [1, 1, 0]), (0.999, [9, 1, 0])])
def test_every_class_keeps_training_samples(tmp_path, share, held):
    save(tmp_path, content(13, label=np.array([0] * 10 + [1] * 2 + [2])))
    data = load(tmp_path, validation_share=share)
    assert data.validation.labels.bincount(minlength=3).tolist() == held


def test_the_default_standardizes_by_training_samples_alone(tmp_path):
    lengths = np.arange(30) % STEPS + 1
    train, test = content(length=lengths), content(9)
    train["skeleton"][..., 0] = 7.3
    train["audio"] = 100 + 9 * train["audio"]
    save(tmp_path, train, test)
    data = load(tmp_path)
    raw = load(tmp_path, standardize=False)
    assert raw.moments is None
    for modality in range(2):
        samples = range(len(data.train))
        steps = torch.cat([data.train[i].inputs[modality] for i in samples])
        before = torch.cat([raw.train[i].inputs[modality] for i in samples]).double()
        torch.testing.assert_close(steps.mean(0), torch.zeros(steps.shape[1]), atol=1e-4, rtol=0)
        deviation = before.std(0, correction=0)
        if modality == 0:
            assert (steps[:, 0].abs() < 1e-5).all()
            deviation[0] = 1
        expected = (stacked(raw.test, modality) - before.mean(0)) / deviation
        torch.testing.assert_close(
            stacked(data.test, modality), expected.float(), atol=1e-4, rtol=1e-4
        )


def test_a_large_set_is_standardized_part_by_part_to_the_same_bits(tmp_path, monkeypatch):
    save(tmp_path)
    whole = load(tmp_path).train
    monkeypatch.setattr(arrays_module, "PART", 7)
    parts = load(tmp_path).train
    for modality in range(2):
        assert torch.equal(stacked(parts, modality), stacked(whole, modality))


def with_value(key, value, sample=4, step=1):
    arrays = content()
    arrays[key][(sample, step)[: arrays[key].ndim]] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (content(audio=None), "for two modalities or more, but has skeleton"),
        (content(audio=np.zeros((30, STEPS))), r"'audio' must be \[samples, T, D\].*\[30, 5\]"),
        (content(audio=np.zeros((30, STEPS, 0))), r"none of them 0, but has shape \[30, 5, 0\]"),
        (content(audio=np.full((30, STEPS, 2), "a")), "'audio' must be numbers, .* dtype <U1"),
        (
            content(audio=np.zeros((30, 4, 2))),
            r"'skeleton' has shape \[30, 5, 4\] and 'audio' \[30",
        ),
        (content(audio=np.zeros((29, 5, 2))), r"modalities must agree in samples and T"),
        (content(label=None), "'label' .* is missing; it has skeleton, audio"),
        (content(label=np.arange(30.0)), "'label' must be integers, but has dtype float64"),
        (content(label=np.arange(29)), r"'label' must be \[samples\] = \[30\], .* \[29\]"),
        (with_value("label", -1), "'label' must be 0 or more, but is -1 for sample 4"),
        (with_value("label", 4), r"each class in 0..4, but no sample has 3: number the classes"),
        (content(label=np.arange(30) % 3 + 1), "no sample has 0: number the classes from 0"),
        (content(classes=np.array(["a", "b"])), r"'label' must be in 0..1, but is 2 for sample 2"),
        (content(classes=np.arange(3)), "'classes' must be strings .* dtype int64"),
        (content(length=np.full(30, 2.0)), "'length' must be integers, but has dtype float64"),
        (content(length=np.full(30, 6)), r"'length' must be in 1..5, but is 6 for sample 0"),
        (content(length=np.full(30, 0)), r"'length' must be in 1..5, but is 0 for sample 0"),
        (with_value("audio", np.nan), "'audio' must be finite .* 1 of 30 .* sample 4 at step 1"),
        (with_value("skeleton", np.inf), "'skeleton' must be finite .* sample 4 at step 1"),
        (with_value("skeleton", 1e39), "'skeleton' must be finite in float32"),
    ],
)
def test_wrong_training_arrays(tmp_path, arrays, message):
    save(tmp_path, arrays)
    with pytest.raises(ValueError, match=rf"train\.npz: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["test", "validation"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (content(9, audio=None, speech=np.zeros((9, 5, 2))), "train.npz, skeleton, audio, but are"),
        (content(9, more=np.zeros((9, 5, 2))), "modalities must be those of .*train.npz"),
        (content(9, audio=np.zeros((9, 5, 3))), r"'audio' must have D = 2 as in .*\[9, 5, 3\]"),
        (content(9, label=np.full(9, 3)), r"'label' must be in 0..2, but is 3 for sample 0"),
        (content(9, label=None), r"'label' \[samples\] is missing"),
        (content(9, classes=np.array(["c", "b", "a"])), r"'classes' must be those of .*train.npz"),
    ],
)
def test_arrays_that_differ_from_training(tmp_path, name, arrays, message):
    save(tmp_path, **{name: arrays})
    with pytest.raises(ValueError, match=rf"{name}\.npz: .*{message}"):
        load(tmp_path)


def new_samples(root, *files, **options):
    data = load(root, **options)
    return ArraysOptions(**options).samples_of(files, data, root / "best.pt")


def test_new_samples_need_no_labels_and_are_treated_as_the_others(tmp_path):
    save(tmp_path, test=(test := content(9, skeleton=5 + content(9)["skeleton"])))
    test_split = load(tmp_path).test
    new = tmp_path / "new"
    new.mkdir()
    np.savez(new / "b.npz", **{key: test[key] for key in ("audio", "skeleton", "label")})
    np.savez(new / "a.npz", audio=test["audio"][:2], skeleton=test["skeleton"][:2])
    a, b, again = new_samples(tmp_path, new, new / "a.npz")
    assert a.labels.tolist() == again.labels.tolist() == [-1, -1]
    assert b.labels.tolist() == test_split.labels.tolist()
    for modality in (0, 1):
        assert torch.equal(stacked(b, modality), stacked(test_split, modality))
        assert torch.equal(stacked(a, modality), stacked(test_split, modality)[:2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            content(9, audio=None, label=None),
            "new.npz: modalities .*best.pt, skeleton, audio, but are",
        ),
        ({"label": np.arange(3)}, "modalities must be those of .*best.pt, .* but are none"),
        (content(9, audio=np.zeros((9, 5, 3))), r"'audio' must have D = 2 as in .*best.pt"),
        (content(9, label=np.full(9, 3)), r"'label' must be in 0..2, but is 3 for sample 0"),
        (content(9, length=np.zeros(9, int)), r"'length' must be in 1..5"),
    ],
)
def test_new_samples_that_the_network_does_not_know(tmp_path, arrays, message):
    save(tmp_path)
    np.savez(tmp_path / "new.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        new_samples(tmp_path, tmp_path / "new.npz")


def test_new_samples_that_are_not_there(tmp_path):
    save(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "must hold a file .npz"), ("no.npz", "does not exist")):
        with pytest.raises(FileNotFoundError, match=message):
            new_samples(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["train.npz", "test.npz"])
def test_a_missing_file(tmp_path, name):
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: root must be the folder"):
        load(tmp_path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-400])


def flipped(path):
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 255
    path.write_bytes(damaged)


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("label,audio\n0,1\n")


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def objects(path):
    np.savez(path, **content(audio=np.array([{}, {}])))


@pytest.mark.parametrize("damage", [truncated, flipped, empty, text, one_array, objects])
def test_an_unreadable_file(tmp_path, damage):
    save(tmp_path)
    damage(tmp_path / "train.npz")
    with pytest.raises(OSError, match=r"train\.npz must be a file as numpy.savez writes it"):
        load(tmp_path)


def test_a_file_in_the_archive_that_is_no_array(tmp_path):
    save(tmp_path)
    with zipfile.ZipFile(tmp_path / "train.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"train\.npz: 'readme.txt' must be numbers"):
        load(tmp_path)


def test_nothing_to_hold_out(tmp_path):
    save(tmp_path, content(3), content(3))
    with pytest.raises(ValueError, match=r"no class has two samples.*provide .*validation\.npz"):
        load(tmp_path)


def test_root_is_needed():
    with pytest.raises(ValueError, match=r"root must be the folder of train\.npz"):
        load(None)


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_share_is_checked(tmp_path, share):
    with pytest.raises(ValueError, match="validation_share must be between 0 and 1, but is"):
        load(tmp_path, validation_share=share)
