from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest

pytest.importorskip("torchvision")

from data import miniature

from mmixer_kernels.data import DATA, DamagedFile, NwUclaOptions

NUMBERS = [3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]


def names(split):
    return [clip.name for clip in split.clips]


def load(root, **chosen):
    return NwUclaOptions(image_size=32, **chosen).load(root, 0)


@pytest.fixture
def tree(tmp_path):
    miniature.nw_ucla(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tree):
    return tree / "multiview_action" / "view_1" / "a08_s02_e00"


def source(root, modality, name="a08_s02_e00_v01"):
    clips = NwUclaOptions().listing(root).clips
    return next(clip for clip in clips if clip.name == name).sources[modality]


def test_views_split_and_a_subject_validates(tree, capsys):
    data = load(tree)
    assert names(data.train) == [
        *("a01_s02_e00_v01", "a01_s02_e00_v02", "a08_s02_e00_v01", "a08_s02_e00_v02")
    ]
    assert names(data.validation) == [
        *("a01_s01_e00_v01", "a01_s01_e00_v02", "a08_s01_e00_v01", "a08_s01_e00_v02")
    ]
    assert {name[-3:] for name in names(data.test)} == {"v03"}
    assert len(data.test) == 4
    assert data.train.labels.tolist() == [0, 0, 6, 6]
    assert [data.classes[label] for label in (0, 6, 9)] == [
        *("pick up with one hand", "donning", "carry")
    ]
    assert [x.shape for x in data.train[0].inputs] == [(2, 3, 32, 32)] * 2
    assert "1 skipped folders without a frame" in capsys.readouterr().err
    assert names(load(tree, validation_subject=2).train) == names(data.validation)


@pytest.mark.parametrize("modality", ["rgb", "depth"])
def test_frames_are_in_the_order_of_their_numbers(tree, modality):
    frames = source(tree, modality).read(range(12), 24)
    assert [miniature.number(frame) for frame in frames] == NUMBERS


def test_pictures_are_paired_by_number(tree, folder, capsys):
    next(folder.glob("frame_4_*_rgb.jpg")).unlink()
    next(folder.glob("frame_10_*_depth.png")).unlink()
    next(folder.glob("frame_11_*_depth.png")).unlink()
    for modality in ("rgb", "depth"):
        frames = source(tree, modality)
        found = [miniature.number(frame) for frame in frames.read(range(frames.count()), 24)]
        assert found == [n for n in NUMBERS if n not in (4, 10, 11)]
    load(tree)
    line = next(line for line in capsys.readouterr().err.splitlines() if "alone" in line)
    assert line.endswith(f"left out: {folder} (11 rgb, 10 depth)")


def test_folders_without_depth_lack_the_modality(tree, folder, capsys):
    for path in folder.glob("*_depth.png"):
        path.unlink()
    assert "a08_s02_e00_v01" not in names(load(tree).train)
    assert "1 of 4 train samples lack a modality" in capsys.readouterr().err


def test_unknown_actions_are_skipped_and_reported(tree, folder, capsys):
    folder.rename(folder.with_name("a07_s02_e00"))
    assert len(load(tree).train) == 3
    assert "1 skipped folders of no known action: " in capsys.readouterr().err


def test_a_damaged_picture_is_named(tree, folder):
    path = next(folder.glob("frame_5_*_depth.png"))
    path.write_bytes(path.read_bytes()[:60])
    assert len(source(tree, "depth").read([0, 1, 3], 24)) == 3
    with pytest.raises(DamagedFile, match=f"^{path}: "):
        source(tree, "depth").read([2], 24)


def test_depth_is_exact(tree, folder):
    values = np.random.default_rng(0).integers(0, 4000, (24, 32), np.uint16)
    miniature.write_picture(next(folder.glob("frame_3_*_depth.png")), values)
    np.testing.assert_array_equal(source(tree, "depth").read([0], 24)[0, 0].numpy(), values)


def test_two_pictures_of_one_frame_are_an_error(tree, folder):
    miniature.write_picture(folder / "frame_5_tc_9_rgb.jpg", miniature.picture(5, (48, 64), 1))
    with pytest.raises(ValueError, match="has two pictures of one frame, frame_5_tc_1165_rgb"):
        load(tree)


def test_a_sequence_that_is_there_twice_is_an_error(tree, folder):
    copy = tree / "copy" / "view_1" / folder.name
    shutil.copytree(folder, copy)
    with pytest.raises(ValueError, match=f"a08_s02_e00_v01 is there twice, one is .*{folder.name}"):
        load(tree)


def test_root_may_be_the_folder_of_the_views(tree):
    inner = NwUclaOptions().listing(tree / "multiview_action")
    assert len(inner.clips) == len(list(itertools.product((1, 2, 3), (1, 2), (1, 8))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("rgb", "ir")}, "modalities must be two or more of rgb, depth, each once"),
        ({"validation_subject": 11}, r"validation_subject must be in 1..10 or None, but is 11"),
        ({"validation_subject": 10}, "no complete sample for validation: choose another"),
    ],
)
def test_errors(tree, options, message):
    with pytest.raises(ValueError, match=message):
        load(tree, **options)


def test_no_root_is_an_error():
    with pytest.raises(ValueError, match="root must be the folder of nw-ucla's files"):
        NwUclaOptions().load(None, 0)
    assert DATA["nw-ucla"] is NwUclaOptions
