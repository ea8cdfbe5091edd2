from __future__ import annotations

import collections
import itertools

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

from data import miniature

from mmixer_kernels.data import DATA, DamagedFile, Ntu60Options, Ntu120Options, collate
from mmixer_kernels.data.ntu import TRAINING_SUBJECTS_60, TRAINING_SUBJECTS_120, Name, parse
from mmixer_kernels.data.ntu_classes import CLASSES

ALL = ("rgb", "depth", "ir")


def names(split):
    return [clip.name for clip in split.clips]


def load(root, options=Ntu60Options, seed=0, **chosen):
    return options(image_size=32, **chosen).load(root, seed)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("ntu")
    miniature.ntu(root, modalities=ALL)
    return root


def test_names():
    assert parse("S017C003P040R002A060") == Name(17, 3, 40, 2, 60)
    for wrong in ("S017C003P040R002A06", "S017C003P040R002A060_rgb", "view_1"):
        with pytest.raises(ValueError, match="is no sample's name"):
            parse(wrong)


def test_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 120
    assert Ntu60Options.classes == CLASSES[:60]
    assert Ntu120Options.classes == CLASSES
    assert (CLASSES[0], CLASSES[59]) == ("drink water", "walking apart from each other")
    assert CLASSES[119] == "finger-guessing game (playing rock-paper-scissors)"


def test_the_lists_of_training_subjects_are_as_long_as_published():
    assert (len(TRAINING_SUBJECTS_60), sum(TRAINING_SUBJECTS_60)) == (20, 359)
    assert (len(TRAINING_SUBJECTS_120), len(TRAINING_SUBJECTS_120 - TRAINING_SUBJECTS_60)) == (
        53,
        33,
    )
    assert max(TRAINING_SUBJECTS_60) <= 40 < min(TRAINING_SUBJECTS_120 - TRAINING_SUBJECTS_60)
    assert max(TRAINING_SUBJECTS_120) <= 106


@pytest.mark.parametrize(
    ("options", "name", "part"),
    [
        (Ntu60Options(), "S001C001P001R001A001", "validation"),
        (Ntu60Options(), "S001C001P002R001A001", "train"),
        (Ntu60Options(), "S001C002P003R001A001", "test"),
        (Ntu60Options(validation_subject=None), "S001C001P001R001A001", "train"),
        (Ntu60Options(validation_subject=38), "S001C001P038R001A001", "validation"),
        (Ntu60Options(), "S001C001P045R001A001", "test"),
        (Ntu60Options(split="cross-view"), "S001C001P001R001A001", "test"),
        (Ntu60Options(split="cross-view"), "S001C002P001R001A001", "validation"),
        (Ntu60Options(split="cross-view"), "S001C003P003R001A001", "train"),
        (Ntu120Options(), "S018C001P045R001A061", "train"),
        (Ntu120Options(), "S018C001P044R001A061", "test"),
        (Ntu120Options(split="cross-setup"), "S018C001P044R001A061", "train"),
        (Ntu120Options(split="cross-setup"), "S019C001P045R001A061", "test"),
        (Ntu120Options(split="cross-setup"), "S002C001P001R001A061", "validation"),
    ],
)
def test_splits(options, name, part):
    assert options.part(name) == part


def test_published_counts_share_a_total():
    for options, splits, total in (
        (Ntu60Options, ("cross-subject", "cross-view"), 56_880),
        (Ntu120Options, ("cross-subject", "cross-setup"), 114_480),
    ):
        for split in splits:
            assert sum(options(split=split).published().values()) == total


def test_a_tree_becomes_three_splits(tree, capsys):
    data = load(tree, modalities=ALL)
    assert data.modalities == ALL
    assert data.classes == CLASSES[:60]
    assert data.extractors is data.feature_sizes is None
    assert names(data.train) == ["S001C001P002R001A001", "S001C001P002R001A002"]
    assert names(data.validation) == ["S001C001P001R001A001", "S001C001P001R001A002"]
    assert names(data.test) == ["S001C001P003R001A001", "S001C001P003R001A002"]
    assert data.train.labels.tolist() == [0, 1]
    assert (data.train.training, data.validation.training, data.test.training) == (
        True,
        False,
        False,
    )
    assert capsys.readouterr().err.splitlines() == [
        "note: ntu60: 4 train samples, published are 40,320",
        "note: ntu60: 2 test samples, published are 16,560",
    ]


def test_every_source_gives_its_frames(tree):
    data = load(tree, modalities=ALL)
    shapes = {"rgb": (3, 54, 96), "depth": (1, 54, 64), "ir": (1, 54, 64)}
    for split in (data.train, data.validation, data.test):
        for clip in split.clips:
            for modality, source in clip.sources.items():
                frames = source.read(range(source.count()), 54)
                found = [miniature.number(frame) for frame in frames]
                assert found == list(range(source.count()))
                assert frames.shape[1:] == shapes[modality]
                assert frames.dtype == (torch.uint16 if modality == "depth" else torch.uint8)


def test_samples_are_the_networks_inputs(tree):
    data = load(tree, modalities=("ir", "rgb"))
    batch = collate([data.train[0], data.test[1]])
    assert [x.shape for x in batch.inputs] == [(2, 3, 3, 32, 32)] * 2
    assert batch.labels.tolist() == [0, 1]
    assert load(tree, frames=5).test[0].inputs[0].shape == (5, 3, 32, 32)
    assert load(tree, stride=4).train[0].length == 5


def test_depth_and_ir_are_coloured_by_their_range(tree):
    frame, fixed = (load(tree, color_range=kind).test[0].inputs[1] for kind in ("frame", "fixed"))
    assert frame.shape == fixed.shape
    assert not torch.equal(frame, fixed)


def test_no_validation_subject_validates_on_what_is_trained(tree):
    data = load(tree, validation_subject=None)
    assert names(data.train) == names(data.validation)
    assert len(data.train) == 4
    assert not data.validation.training


@pytest.mark.parametrize("per_setup", [False, True])
def test_archives_may_be_unpacked_flat_or_by_setup(tmp_path, per_setup):
    written = miniature.ntu(
        tmp_path, setups=(1, 2), actions=(1,), modalities=ALL, frames=2, per_setup=per_setup
    )
    listing = Ntu60Options(modalities=ALL).listing(tmp_path)
    assert [clip.name for clip in listing.clips] == sorted(written)
    assert all(set(clip.sources) == set(ALL) for clip in listing.clips)
    assert (tmp_path / "nturgb+d_ir_s002").exists() == per_setup


def test_both_kinds_of_depth_can_lie_side_by_side(tmp_path):
    for depth in ("masked", "full"):
        miniature.ntu(tmp_path, actions=(1,), frames=2, depth=depth)
    least = {
        depth: load(tmp_path, depth=depth).test.clips[0].sources["depth"].read([0], 54).int().min()
        for depth in ("masked", "full")
    }
    assert least == {"masked": 0, "full": 700}


def test_folders_of_anything_else_are_passed_over(tmp_path):
    written = miniature.ntu(tmp_path, actions=(1,), frames=2)
    frames = tmp_path / "rgb_frames" / written[0]
    frames.mkdir(parents=True)
    (frames / "00001.jpg").write_bytes(b"")
    (tmp_path / "nturgb+d_rgb" / f"._{written[0]}_rgb.avi").write_bytes(b"")
    listing = Ntu60Options().listing(tmp_path)
    assert [clip.name for clip in listing.clips] == written


def test_a_data_set_takes_its_own_samples_alone(tmp_path):
    for setup, action in itertools.product((17, 18), (60, 61)):
        miniature.ntu(tmp_path, (setup,), subjects=(1,), actions=(action,), frames=1)
    found = {
        options: [clip.name for clip in options().listing(tmp_path).clips]
        for options in (Ntu60Options, Ntu120Options)
    }
    assert found[Ntu60Options] == ["S017C001P001R001A060"]
    assert len(found[Ntu120Options]) == 4


def damaged(root, *damage):
    miniature.ntu(root, actions=(1, 2), frames=2, damage=damage)
    return root


def test_training_samples_without_a_modality_are_left_out_and_reported(tmp_path, capsys):
    damaged(
        tmp_path,
        ("S001C001P001R001A001", "depth", "missing"),
        ("S001C001P002R001A002", "rgb", "missing"),
    )
    data = load(tmp_path)
    assert names(data.train) == ["S001C001P002R001A001"]
    assert names(data.validation) == ["S001C001P001R001A002"]
    error = capsys.readouterr().err
    assert (
        "note: ntu60: 1 of 2 train samples lack a modality and are left out: "
        "S001C001P002R001A002 (no rgb)\n" in error
    )
    assert "1 of 2 validation samples lack a modality" in error
    assert "(no depth)" in error


def test_test_samples_without_a_modality_are_an_error_unless_allowed(tmp_path, capsys):
    damaged(tmp_path, ("S001C001P003R001A002", "depth", "missing"))
    message = r"1 of 2 test samples lack a modality: S001C001P003R001A002 \(no depth\).*--allow"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    data = load(tmp_path, allow_missing=True)
    assert names(data.test) == ["S001C001P003R001A001"]
    error = capsys.readouterr().err
    assert "1 of 2 test samples lack a modality and are left out: S001C001P003R001A002" in error


def test_the_report_names_the_first_and_counts_the_rest(tmp_path, capsys):
    written = miniature.ntu(
        tmp_path, actions=range(1, 10), subjects=(1, 2, 3), frames=1, modalities=("rgb",)
    )
    for name in written:
        if "P002" not in name or "A001" in name:
            picture = miniature.depth_picture(0, miniature.KINECT_SIZE, masked=True)
            folder = tmp_path / "nturgb+d_depth_masked" / name
            miniature.write_picture(folder / "MDepth-00000001.png", picture)
    load(tmp_path)
    line = next(line for line in capsys.readouterr().err.splitlines() if "lack" in line)
    assert "8 of 9 train samples" in line
    assert line.endswith("S001C001P002R001A006 (no depth), and 3 more")


def test_damage_is_found_when_a_sample_is_read(tmp_path):
    damaged(tmp_path, ("S001C001P002R001A001", "rgb", "truncated"))
    data = load(tmp_path)
    with pytest.raises(DamagedFile, match=r"nturgb\+d_rgb/S001C001P002R001A001_rgb\.avi: "):
        data.train[0]
    assert data.train[1].label == 1


def test_a_file_that_is_there_twice_is_an_error(tmp_path):
    for folder in ("one", "two"):
        miniature.ntu(tmp_path / folder, actions=(1,), subjects=(1,), frames=1)
    with pytest.raises(ValueError, match=r"of S001C001P001R001A001 is there twice: .* and "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("rgb",)}, "modalities must be two or more of rgb, depth, ir, each once"),
        ({"modalities": ("rgb", "rgb")}, "each once, but are 'rgb rgb'"),
        ({"validation_subject": 3}, r"one of the training subjects 1, 2, 4.* or None, but is 3"),
        ({"validation_subject": 38}, "no complete sample for validation: choose another"),
        ({"stride": 0}, "stride must be 1 or more, but is 0"),
        ({"image_size": 4}, "image_size must be 8 or more, but is 4"),
    ],
)
def test_errors(tree, options, message):
    with pytest.raises(ValueError, match=message):
        Ntu60Options(**options).load(tree, 0)


def test_a_wrong_root_is_named(tmp_path, tree):
    with pytest.raises(ValueError, match=r"root must be the folder of ntu60's files.*pass --root"):
        Ntu60Options().load(None, 0)
    with pytest.raises(FileNotFoundError, match=r"must be ntu60's folder, but .*gone is none"):
        Ntu60Options().load(tmp_path / "gone", 0)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no rgb or depth of ntu60"):
        Ntu60Options().load(tmp_path, 0)
    with pytest.raises(ValueError, match="no complete sample for train"):
        Ntu60Options(split="cross-view").load(tree, 0)


def test_other_subjects_can_validate_across_views_and_setups(tmp_path):
    miniature.ntu(tmp_path, (1, 2), cameras=(1, 2), subjects=(3, 4), actions=(1,), frames=1)
    view = load(tmp_path, split="cross-view", validation_subject=3)
    setup = load(tmp_path, Ntu120Options, split="cross-setup", validation_subject=3)
    counts = collections.Counter(
        len(split) for data in (view, setup) for split in (data.train, data.validation, data.test)
    )
    assert counts == {2: 4, 4: 2}


def test_they_are_registered():
    assert (DATA["ntu60"], DATA["ntu120"]) == (Ntu60Options, Ntu120Options)
