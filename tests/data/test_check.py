from __future__ import annotations

import itertools

import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")

from data import miniature

from mmixer_kernels import train
from mmixer_kernels.data import Ntu60Options, NwUclaOptions
from mmixer_kernels.data.check import check

VIDEOS = ("S001C001P001R001A001", "S001C001P002R001A001", "S001C001P003R001A001")


def ntu(root, *damage, **options):
    miniature.ntu(root, actions=(1,), modalities=("rgb", "depth", "ir"), damage=damage, **options)
    return root


def run(*arguments):
    return train.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("full", [False, True])
def test_a_good_tree_lacks_only_what_is_published(tmp_path, full):
    report = check(Ntu60Options(), ntu(tmp_path), full)
    assert report.wrong == [
        "train with validation: 2 complete samples, published are 40,320",
        "test: 1 complete samples, published are 16,560",
    ]
    assert [line.split() for line in report.counts] == [
        ["ntu60", "train", "validation", "test"],
        ["rgb", "1", "1", "1"],
        ["depth", "1", "1", "1"],
        ["all", "of", "them", "1", "1", "1"],
    ]
    allowed = check(Ntu60Options(allow_missing=True), tmp_path, full)
    assert allowed.wrong == []
    assert allowed.notes == report.wrong


@pytest.mark.parametrize(
    ("kind", "full"),
    [
        *itertools.product(("empty", "garbage", "truncated"), (False, True)),
        ("flipped", True),  # which only decoding tells
    ],
)
@pytest.mark.parametrize("modality", ["rgb", "depth", "ir"])
def test_damaged_files_are_listed(tmp_path, modality, kind, full):
    root = ntu(tmp_path)
    path = miniature.spoil(root, VIDEOS[2], modality, kind)
    options = Ntu60Options(modalities=("rgb", "depth", "ir"), allow_missing=True)
    (wrong,) = check(options, root, full).wrong
    assert wrong.startswith(f"{VIDEOS[2]} (test): {path}: ")


def test_every_missing_and_damaged_file_is_listed(tmp_path):
    root = ntu(
        tmp_path,
        (VIDEOS[0], "rgb", "missing"),
        (VIDEOS[1], "depth", "gap"),
        (VIDEOS[1], "rgb", "truncated"),
        (VIDEOS[2], "depth", "missing"),
    )
    report = check(Ntu60Options(), root)
    assert report.wrong[:2] == [
        f"{VIDEOS[0]} (validation): has no rgb",
        f"{VIDEOS[2]} (test): has no depth",
    ]
    damage = "\n".join(report.wrong[4:])
    assert len(report.wrong) == 6
    assert f"{VIDEOS[1]} (train): " in damage
    assert "has no frame 5, but MDepth-00000006.png" in damage
    assert f"{VIDEOS[1]}_rgb.avi: has " in damage
    assert report.counts[3].split() == ["all", "of", "them", "1", "0", "0"]
    assert str(report).endswith("\n6 things are wrong")
    assert check(Ntu60Options(), root, workers=2).wrong == report.wrong


def test_modalities_of_unequal_length_are_noted(tmp_path):
    root = ntu(tmp_path)
    sorted((tmp_path / "nturgb+d_depth_masked" / VIDEOS[1]).iterdir())[-1].unlink()
    notes = check(Ntu60Options(allow_missing=True), root).notes
    assert notes[-1].startswith("1 samples differ in their modalities' frames")
    assert notes[-1].endswith(f"{VIDEOS[1]} (20 rgb, 19 depth)")


def test_nw_ucla_asserts_no_count(tmp_path):
    miniature.nw_ucla(tmp_path)
    report = check(NwUclaOptions(), tmp_path, full=True)
    assert report.wrong == []
    notes = "\n".join(report.notes)
    assert "1 skipped folders without a frame" in notes
    assert "1,484" in notes
    assert "1,475" in notes
    assert str(report).endswith("all is well")


def test_damaged_pictures_of_nw_ucla_are_listed(tmp_path):
    miniature.nw_ucla(tmp_path)
    folder = tmp_path / "multiview_action" / "view_3" / "a01_s01_e00"
    cut, empty = (
        next(folder.glob(f"frame_{n}_*_{kind}")) for n, kind in ((4, "rgb.jpg"), (5, "depth.png"))
    )
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    for full in (False, True):
        wrong = check(NwUclaOptions(), tmp_path, full).wrong
        assert [line.split(": ")[:2] for line in wrong] == [
            ["a01_s01_e00_v03 (test)", str(path)] for path in (cut, empty)
        ]


def test_the_command_exits_with_1_when_something_is_wrong(tmp_path, capsys):
    root = ntu(tmp_path / "data", (VIDEOS[1], "rgb", "truncated"))
    arguments = ("--data", "ntu60", "--root", root, "--output", tmp_path / "run", "--check")
    assert run(*arguments) == 1
    printed = capsys.readouterr().out
    assert f"{VIDEOS[1]}_rgb.avi: has " in printed
    assert printed.endswith("3 things are wrong\n")
    assert run(*arguments, "full", "--allow-missing", "--modalities", "depth", "ir") == 0
    assert capsys.readouterr().out.endswith("all is well\n")
    assert not (tmp_path / "run").exists()


def test_the_command_names_what_cannot_be_checked(tmp_path, capsys):
    assert run("--data", "synthetic", "--check") == 2
    assert capsys.readouterr().err == (
        "error: --check is for data sets of video, but --data is synthetic\n"
    )
    assert run("--data", "nw-ucla", "--root", tmp_path, "--check") == 2
    assert f"{tmp_path} holds no rgb or depth of nw-ucla" in capsys.readouterr().err
