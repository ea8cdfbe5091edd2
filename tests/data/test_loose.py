"""Clips given file by file, from miniature trees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from data import miniature

from mmixer_kernels.data import ClipsOptions, Data, Ntu60Options, NwUclaOptions, Split
from mmixer_kernels.data.base import UNKNOWN
from mmixer_kernels.data.clips import Clip
from mmixer_kernels.data.loose import clips_of as clips_of_data
from mmixer_kernels.data.video import VideoOptions
from mmixer_kernels.errors import DamagedFile

NONE = Split(torch.zeros(0, dtype=torch.int64))
ALL = Ntu60Options(modalities=("rgb", "depth", "ir"))


def clips_of(
    files: Sequence[Path],
    options: VideoOptions,
    classes: tuple[str, ...] = (),
    forms: dict[str, str] | None = None,
) -> list[Clip]:
    """The samples of a network that knows these classes and forms."""
    names = options.modalities, classes
    data = Data(*names, NONE, NONE, NONE, extractors=None, feature_sizes=None, forms=forms)
    return clips_of_data(files, options, data)


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


OWN = ClipsOptions(modalities=("rgb", "depth"))
FORMS = {"rgb": "colour", "depth": "16-bit"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Recordings whose folder has no list of a data set."""
    names = ["walk/a", "b", "c run"]
    miniature.clips(tmp_path, {"new.txt": names, "some.txt": ["walk/a stand", "b\t7\tsit"]})
    return tmp_path


def recordings(*files: Path, forms: dict[str, str] = FORMS) -> list[Clip]:
    return clips_of(files, OWN, ("sit", "stand"), forms)


def test_a_folder_of_recordings_is_all_its_samples(own: Path) -> None:
    clips = recordings(own)
    assert [(clip.name, clip.label) for clip in clips] == [
        *((name, UNKNOWN) for name in ("b", "c", "walk/a")),
    ]
    assert len(OWN.split_of([clips[2]], 0, False)[0].inputs) == 2
    frames = clips[2].sources["depth"].read([0, 7], 48)
    assert [miniature.number(frame) for frame in frames] == [0, 7]


def test_a_list_names_recordings_beside_it_with_labels_or_without(own: Path) -> None:
    (own / "new.txt").write_text("walk/a\nc\n")
    clips = recordings(own / "new.txt", own / "rgb" / "b", own / "depth" / "b")
    assert [(clip.name, clip.label) for clip in clips] == [
        *((name, UNKNOWN) for name in ("walk/a", "c", "b")),
    ]
    clips = recordings(own / "some.txt")
    assert [(clip.name, clip.label) for clip in clips] == [("walk/a", 1), ("b", 0)]


def test_names_with_blanks_need_no_tab_in_a_list_without_labels(own: Path) -> None:
    for modality in OWN.modalities:
        (own / modality / "walk" / "a").rename(own / modality / "walk" / "a 1")
    (own / "new.txt").write_text("walk/a 1\nb\nc sit\n")
    clips = recordings(own / "new.txt")
    assert [(clip.name, clip.label) for clip in clips] == [
        *(("walk/a 1", UNKNOWN), ("b", UNKNOWN), ("c", 0)),
    ]


def test_recordings_are_given_one_by_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = miniature.write_recording(own / "rgb" / "last", "MP4", 3)
    miniature.write_recording(own / "depth" / "last", "16-bit", 5)
    monkeypatch.chdir(own / "rgb")
    files = [Path("walk/a"), Path(video.name), own / "depth" / "last", Path("../depth/walk/a")]
    clips = recordings(*files)
    assert [clip.name for clip in clips] == ["walk/a", "last"]
    assert [clips[1].sources[modality].count() for modality in OWN.modalities] == [3, 5]
    of_folder = {clip.name: clip for clip in recordings(own)}
    assert [of_folder[clip.name].sources["depth"].count() for clip in clips] == [12, 5]
    inside = own / "rgb" / "set"  # a folder above has a modality's name too
    pair = [miniature.write_recording(inside / m / "z/y", "16-bit", 2) for m in OWN.modalities]
    assert [clip.name for clip in recordings(*pair)] == ["z/y"]


def test_recordings_that_make_up_no_sample_are_named(own: Path) -> None:
    (own / "x.avi").write_bytes(b"")
    for given, message in (
        ([own / "rgb" / "b"], r"the sample b lacks depth: give \.\.\./depth/b too"),
        ([own, own / "rgb" / "b"], r"rgb/b is the second rgb of the sample b: give one"),
        ([own / "x.avi"], r"x\.avi must lie in a folder named as its modality, rgb or depth, or"),
        ([own / "rgb"], r"rgb must lie in a folder named as its modality, rgb or depth, or be a"),
    ):
        with pytest.raises(ValueError, match=message):
            recordings(*given)
    with pytest.raises(FileNotFoundError, match=r"rgb/y does not exist"):
        recordings(own / "rgb" / "y")
    (own / "new.txt").write_text("b\ny\n")
    with pytest.raises(ValueError, match=r"the sample y lacks rgb and depth"):
        recordings(own / "new.txt")
    (own / "new.txt").write_text("b\nc sleep\n")
    with pytest.raises(ValueError, match=r"new\.txt, line 2: label must be .* but is 'sleep'"):
        recordings(own / "new.txt")


def test_recordings_have_the_forms_of_the_training(own: Path) -> None:
    (clip,) = recordings(own / "rgb" / "b", own / "depth" / "b", forms={**FORMS, "depth": "8-bit"})
    with pytest.raises(DamagedFile, match=r"depth/b/000000\.png: must have 8 bits per channel"):
        OWN.split_of([clip], 0, False)[0]
