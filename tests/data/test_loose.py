"""Clips given file by file, from miniature trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from data import miniature

from mmixer_kernels.data import Ntu60Options, NwUclaOptions
from mmixer_kernels.data.loose import UNKNOWN, clips_of

ALL = Ntu60Options(modalities=("rgb", "depth", "ir"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    miniature.ntu(tmp_path, subjects=(3,), modalities=("rgb", "depth", "ir"))
    return tmp_path


def of(root: Path, name: str) -> dict[str, Path]:
    return {
        "rgb": root / "nturgb+d_rgb" / f"{name}_rgb.avi",
        "depth": root / "nturgb+d_depth_masked" / name,
        "ir": root / "nturgb+d_ir" / f"{name}_ir.avi",
    }


def test_files_in_any_order_are_the_data_sets_own_samples(root: Path) -> None:
    names = ["S001C001P003R001A001", "S001C001P003R001A002"]
    files = [of(root, name)[modality] for modality in ("ir", "depth", "rgb") for name in names]
    clips = clips_of(files, ALL)
    expected = {clip.name: clip for clip in ALL.find(root).clips}
    assert [clip.name for clip in clips] == names
    for clip in clips:
        assert clip.label == expected[clip.name].label
        assert {name: source.count() for name, source in clip.sources.items()} == {
            name: source.count() for name, source in expected[clip.name].sources.items()
        }
    ours, theirs = (ALL.split_of([c], 0, False)[0] for c in (clips[1], expected[names[1]]))
    assert all((x == y).all() for x, y in zip(ours.inputs, theirs.inputs, strict=True))


def test_files_of_ones_own_have_no_class(root: Path) -> None:
    files = of(root, "S001C001P003R001A001")
    own = [
        files["rgb"].rename(root / "wave_rgb.avi"),
        files["depth"].rename(root / "wave_depth"),
        files["ir"].rename(root / "wave_ir.avi"),
    ]
    (clip,) = clips_of(own, ALL)
    assert (clip.name, clip.label) == ("wave", UNKNOWN)
    assert len(ALL.split_of([clip], 0, False)[0].inputs) == 3


def test_a_folder_of_nw_ucla_is_a_sample(tmp_path: Path) -> None:
    miniature.nw_ucla(tmp_path)
    options = NwUclaOptions()
    folders = [tmp_path / "multiview_action" / f"view_{v}" / "a08_s01_e00" for v in (1, 3)]
    clips = clips_of(folders, options)
    assert [clip.name for clip in clips] == ["a08_s01_e00_v01", "a08_s01_e00_v03"]
    expected = {clip.name: clip for clip in options.find(tmp_path).clips}
    assert clips[1] == expected["a08_s01_e00_v03"]


def test_what_makes_up_no_sample_is_named(root: Path) -> None:
    name = "S001C001P003R001A001"
    files = of(root, name)
    (root / "clip.avi").write_bytes(b"")
    (root / "empty").mkdir()
    for given, message in (
        ([files["rgb"], files["ir"]], rf"sample {name} lacks depth: give the folder {name}"),
        ([files["rgb"], *files.values()], rf"_rgb\.avi is the second rgb of the sample {name}"),
        ([root / "clip.avi"], r"clip\.avi must end in _rgb or _ir before the dot"),
        ([root / "empty"], r"empty must hold MDepth-00000001\.png"),
    ):
        with pytest.raises(ValueError, match=message):
            clips_of(given, ALL)
    with pytest.raises(ValueError, match=r"_ir\.avi is ir, but the network knows rgb, depth"):
        clips_of(list(files.values()), Ntu60Options())
    with pytest.raises(FileNotFoundError, match=r"x_rgb\.avi does not exist"):
        clips_of([root / "x_rgb.avi"], ALL)
