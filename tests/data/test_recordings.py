"""A person's own recordings in each layout: what is read of them, and what is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

from data import miniature

from mmixer_kernels.data import ClipsOptions, Data, Split
from mmixer_kernels.data.alignment import Track, align
from mmixer_kernels.data.check import check
from mmixer_kernels.data.clips import ClipSplit
from mmixer_kernels.data.convert import prepare, verify
from mmixer_kernels.data.recordings import forms_of
from mmixer_kernels.data.transforms import Sampling
from mmixer_kernels.errors import DamagedFile
from mmixer_kernels.training import parsing, run

LISTS = {
    "train.txt": ["a 0", "walk/b 1", "c 0", "d 1"],
    "validation.txt": ["e 0"],
    "test.txt": ["f 1"],
}
KINDS = {"rgb": ("png", 2), "depth": ("16-bit", 2)}
RAW = {"rgb": ("avi", 21), "depth": ("grey.png", 13), "thermal": ("16-bit", 8), "ir": ("avi", 9)}
SMALL = {"image_size": 32, "stride": 4}


def options(**changed: Any) -> ClipsOptions:
    return ClipsOptions(**{**SMALL, **changed})


def names(split: Split) -> list[str]:
    assert isinstance(split, ClipSplit)
    return [clip.name for clip in split.clips]


def numbers(data: Data, part: str = "test", index: int = 0) -> list[list[int]]:
    """The numbers of the frames that are read of a sample, by modality."""
    split = getattr(data, part)
    clip = split.clips[index]
    tracks = {modality: clip.track(modality, split.rule) for modality in split.modalities}
    return [
        [miniature.number(frame) for frame in clip.sources[modality].read(indices, 48)]
        for modality, indices in align(tracks, split.rule, split.sampling).items()
    ]


def test_a_folder_and_its_lists_are_a_data_set(tmp_path: Path) -> None:
    miniature.clips(tmp_path, LISTS)
    data = options().load(tmp_path, 0)
    assert (data.modalities, data.classes) == (("rgb", "depth"), ("0", "1"))
    assert data.forms == {"rgb": "colour", "depth": "16-bit"}
    assert [names(part) for part in (data.train, data.validation, data.test)] == [
        *(["a", "c", "d", "walk/b"], ["e"], ["f"]),
    ]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert numbers(data) == [[0, 4, 8]] * 2
    sample = data.test[0]
    assert [x.shape for x in sample.inputs] == [(3, 3, 32, 32)] * 2
    assert (sample.label, sample.length) == (1, 3)


@pytest.mark.parametrize("kinds", [("jpg", "grey.jpg"), ("png", "png"), ("jpg", "jpg")])
def test_the_layout_of_public_code_is_read_as_it_is(
    tmp_path: Path, kinds: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {
        "dataset_splits/train.txt": ["r0/ 12 0 ", "r1/ 12 1 ", "r2/ 12 0", "r3/ 12 1"],
        "dataset_splits/valid.txt": ["r4/ 12 1 "],
    }
    modalities = {"rgb": (kinds[0], 12), "depth": (kinds[1], 12)}
    miniature.clips(tmp_path, lists, modalities)
    data = options().load(tmp_path, 0)
    assert data.forms == {"rgb": "colour", "depth": "8-bit"}
    assert names(data.test) == ["r4"]
    assert numbers(data) == [[0, 4, 8]] * 2
    assert sorted(names(data.train) + names(data.validation)) == ["r0", "r1", "r2", "r3"]
    assert sorted(data.validation.labels.tolist()) == [0, 1]
    assert "valid.txt is what is tested on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("16-bit", "16-bit"),
        ("16-bit.mkv", "16-bit"),
        ("grey.png", "8-bit"),
        ("grey.jpg", "8-bit"),
        ("jpg", "8-bit"),
        ("grey.mkv", "8-bit"),
        ("avi", "8-bit"),
        ("mp4", "8-bit"),
        ("mov", "8-bit"),
    ],
)
def test_each_kind_of_depth_is_read_by_time(tmp_path: Path, kind: str, form: str) -> None:
    miniature.clips(tmp_path, LISTS, {"rgb": ("mp4", 16), "depth": (kind, 9)})
    data = options().load(tmp_path, 0)
    assert data.forms == {"rgb": "colour", "depth": form}
    assert numbers(data) == [[0, 4, 8, 12], [0, 2, 4, 7]]
    assert numbers(options(modalities=("depth", "rgb")).load(tmp_path, 0)) == [
        *([0, 4, 8], [0, 8, 15]),
    ]
    channels = data.test.clips[0].sources["depth"].read([0], 36).shape[1]  # type: ignore[attr-defined]
    assert channels == 1
    assert data.test[0].inputs[1].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("kind", "form", "channels"),
    [
        ("grey.png", "grey", 1),
        ("grey.mkv", "grey", 1),
        ("16-bit", "16-bit", 1),
        ("png", "colour", 3),
        ("avi", "colour", 3),
    ],
)
def test_a_further_modality_has_the_form_of_its_files(
    tmp_path: Path, kind: str, form: str, channels: int
) -> None:
    kinds = {"rgb": ("jpg", 12), "ir": ("avi", 10), "thermal-1": (kind, 5)}
    miniature.clips(tmp_path, LISTS, kinds)
    data = options(modalities=("rgb", "thermal-1", "ir")).load(tmp_path, 0)
    assert data.forms == {"rgb": "colour", "thermal-1": form, "ir": "grey"}
    assert numbers(data) == [[0, 4, 8], [0, 1, 3], [0, 3, 7]]
    source = data.test.clips[0].sources["thermal-1"]  # type: ignore[attr-defined]
    assert source.read([0], 36).shape[1] == channels
    assert len(data.test[0].inputs) == 3


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    kinds = {"rgb": ("jpg", 9), "flow": ("grey.png", 9), "depth": ("16-bit", 9)}
    miniature.clips(tmp_path, LISTS, kinds)
    wanted = options(modalities=("rgb", "flow", "depth"))
    for modality, kind, message in (
        ("flow", "png", r"flow/f/000000\.png: must be 8-bit grey, but is colour"),
        ("flow", "16-bit", r"flow/f/000000\.png: must have 8 bits per channel, but has 16"),
        ("depth", "grey.png", r"depth/f/000000\.png: must have 16 bits in one channel, but is"),
        ("rgb", "16-bit", r"rgb/f/000000\.(png|jpg): must have 8 bits per channel, but has 16"),
    ):
        folder = tmp_path / modality / "f"
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for path in before:
            path.unlink()
        miniature.write_recording(folder, kind, 9)
        data = wanted.load(tmp_path, 0)
        assert data.forms == {"rgb": "colour", "flow": "grey", "depth": "16-bit"}
        with pytest.raises(DamagedFile, match=message):
            data.test[0]
        (wrong,) = check(wanted, tmp_path, full=True).wrong
        assert wrong.startswith("f (test): ")
        for path in folder.iterdir():
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


def test_the_first_readable_file_tells_the_form(tmp_path: Path) -> None:
    good = miniature.write_recording(tmp_path / "b", "16-bit", 2)
    (tmp_path / "a").mkdir()
    paths = [{"x": str(tmp_path / "a")}, {}, {"x": str(good)}]
    assert forms_of(["x", "ir", "y"], paths) == {"x": "16-bit", "ir": "grey", "y": "colour"}


@pytest.mark.parametrize("given", [False, True])
def test_rates_tell_which_frames_belong_together(tmp_path: Path, given: bool) -> None:
    for name in "abc":
        miniature.write_recording(tmp_path / "rgb" / name, "avi", 30, rate=30)
        kind = "16-bit" if given else "grey.mkv"
        miniature.write_recording(tmp_path / "depth" / name, kind, 12, rate=15)
    miniature.clips(tmp_path, {"train.txt": ["a 0", "b 0"], "test.txt": ["c 0"]}, {})
    rates = {"rates": (30.0, 15.0)} if given else {}
    data = options(align="rate", **rates).load(tmp_path, 0)
    assert numbers(data) == [[0, 4, 8, 12, 16, 20], [0, 2, 4, 6, 8, 10]]  # 0.8 s of them
    assert numbers(options().load(tmp_path, 0)) == [
        *([0, 4, 8, 12, 16, 20, 24, 28], [0, 1, 3, 5, 6, 8, 9, 11]),
    ]
    other = options(align="rate", rates=(30.0, 30.0)).load(tmp_path, 0)
    assert numbers(other) == [[0, 4, 8]] * 2
    notes = check(options(align="rate", **rates), tmp_path).notes
    assert any(
        "seconds, of which" in n and "a (30 rgb in 1.00 s, 12 depth in 0.80 s)" in n for n in notes
    )
    if given:
        with pytest.raises(ValueError, match=r"depth/a has pictures, .* pass --rates"):
            options(align="rate").load(tmp_path, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_is_held_out_by_the_seed(tmp_path: Path, seed: int) -> None:
    train = [f"s{number} {number % 2}" for number in range(20)]
    miniature.clips(tmp_path, {"train.txt": train, "test.txt": ["t 0"]}, KINDS)
    for name in (*(line.split()[0] for line in train), "t"):
        miniature.write_recording(tmp_path / "ir" / name, "grey.png", 2)
    chosen = options(validation_share=0.3)
    data = chosen.load(tmp_path, seed)
    assert data.validation.labels.tolist().count(0) == 3
    assert data.validation.labels.tolist().count(1) == 3
    assert not set(names(data.train)) & set(names(data.validation))
    assert len(data.train) == 14
    held = names(data.validation)
    assert names(chosen.load(tmp_path, seed).validation) == held
    assert names(chosen.load(tmp_path, seed + 1).validation) != held
    # Neither the order of the lines nor the modalities change it.
    (tmp_path / "train.txt").write_text("\n".join(reversed(train)))
    other = options(validation_share=0.3, modalities=("ir", "rgb"))
    assert names(other.load(tmp_path, seed).validation) == held


def test_the_check_has_the_parts_of_the_training(tmp_path: Path) -> None:
    train = [f"s{number} 0" for number in range(4)]
    miniature.clips(tmp_path, {"train.txt": train, "test.txt": ["t 0"]}, KINDS)
    (tmp_path / "rgb" / "s1" / "000001.png").write_bytes(b"")
    found = set()
    for seed in range(6):
        held = names(options().load(tmp_path, seed).validation)
        arguments = ["--data", "clips", "--root", str(tmp_path), "--seed", str(seed), "--check"]
        (wrong,) = run.check(parsing.parse(arguments, "test")).wrong
        assert wrong.startswith("s1 (validation): " if held == ["s1"] else "s1 (train): ")
        found.add(held == ["s1"])
    assert found == {False, True}


def test_missing_files_are_named_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature.clips(tmp_path, LISTS, KINDS)
    for path in (tmp_path / "depth" / "a", tmp_path / "rgb" / "f", tmp_path / "depth" / "f"):
        path.rename(tmp_path / f"{path.parent.name}-{path.name}")
    with pytest.raises(ValueError, match=r"1 of 1 test samples lack a modality: f \(no rgb, depth"):
        options().load(tmp_path, 0)
    report = check(options(), tmp_path)
    assert report.wrong == [
        f"a (train): has no depth ({tmp_path}/train.txt, line 1)",
        f"f (test): has no rgb ({tmp_path}/test.txt, line 1)",
        f"f (test): has no depth ({tmp_path}/test.txt, line 1)",
    ]
    assert [line.split()[-3:] for line in report.counts[1:]] == [
        *(["4", "1", "0"], ["3", "1", "0"], ["3", "1", "0"]),
    ]
    (tmp_path / "rgb-f").rename(tmp_path / "rgb" / "f")
    (tmp_path / "depth-f").rename(tmp_path / "depth" / "f")
    capsys.readouterr()
    assert names(options().load(tmp_path, 0).train) == ["c", "d", "walk/b"]
    assert "1 of 4 train samples lack a modality and are left out: a" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mp4", "jpg", "16-bit"])
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    depth = kind == "16-bit"
    kinds = ("jpg", kind) if depth else (kind, "16-bit")
    miniature.clips(tmp_path, LISTS, {"rgb": (kinds[0], 9), "depth": (kinds[1], 9)})
    path = tmp_path / ("depth" if depth else "rgb") / "f"
    path = path.with_suffix(".mp4") if kind == "mp4" else sorted(path.iterdir())[4]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = options().load(tmp_path, 0)
    with pytest.raises(DamagedFile, match=f"^{path}: "):
        data.test[0]
    for full in (False, True):
        (wrong,) = check(options(), tmp_path, full).wrong[:1]
        assert wrong.startswith(f"f (test): {path}: ")


def test_the_check_names_a_folder_of_another_form(tmp_path: Path) -> None:
    miniature.clips(tmp_path, LISTS, KINDS)
    (tmp_path / "depth" / "f").rename(tmp_path / "f")
    miniature.write_recording(tmp_path / "depth" / "f", "grey.png", 2)
    (wrong,) = check(options(), tmp_path).wrong
    assert f"{tmp_path}/depth/f/" in wrong
    assert "must have 16 bits in one channel" in wrong


def test_the_lists_numbers_of_frames_are_compared(tmp_path: Path) -> None:
    lists = {"train.txt": ["a 12 0", "b 12 0"], "test.txt": ["f 13 0", "g 9 0"]}
    miniature.clips(tmp_path, lists)
    message = f"{tmp_path}/test.txt, line 1: says 13 frames, but f has 12 of rgb"
    data = options().load(tmp_path, 0)
    with pytest.raises(DamagedFile, match=message):
        data.test[0]
    report = check(options(), tmp_path)
    assert [line.partition(": complete")[0] for line in report.wrong] == [
        *(f"f (test): {message}", f"f (test): {message.replace('rgb', 'depth')}"),
    ]
    assert (
        "1 samples have more frames than their lists say, and all are read: "
        "g (12 rgb, 12 depth, listed 9)"
    ) in report.notes


def test_what_is_there_twice_or_in_no_list_is_named(tmp_path: Path) -> None:
    miniature.clips(tmp_path, LISTS, KINDS)
    for name in ("x/new", "other"):
        miniature.write_recording(tmp_path / "rgb" / name, "png", 1)
    miniature.write_recording(tmp_path / "depth" / "last", "avi", 1)
    miniature.write_recording(tmp_path / "depth" / "._last", "avi", 1)
    notes = check(options(), tmp_path).notes
    assert "3 samples are in no list: last, other, x/new" in notes
    assert "frames are read as rgb colour, depth 16-bit" in notes
    assert not any("equal steps" in note for note in notes)
    miniature.write_recording(tmp_path / "depth" / "walk" / "b", "16-bit", 5)
    (tmp_path / "depth" / "walk" / "b" / "000003.png").unlink()
    assert check(options(), tmp_path).notes[-1].endswith(f"missing: {tmp_path}/depth/walk/b")
    miniature.write_recording(tmp_path / "rgb" / "walk" / "b", "avi", 1)
    message = rf"rgb of walk/b \({tmp_path}/train\.txt, line 2\) is there twice, .*b\.avi"
    with pytest.raises(ValueError, match=message):
        options().load(tmp_path, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modalities": ("rgb",)}, "modalities must be two or more names of folders, each once"),
        ({"modalities": ("rgb", "rgb")}, "modalities must be two or more names of folders"),
        ({"modalities": ("rgb", "a/b")}, "modalities must be .* but are 'rgb a/b'"),
        ({"modalities": ("rgb", "label")}, "modalities must be .* not label or length or classes"),
        ({"modalities": ("rgb", "flow")}, "has no folder flow, but depth, rgb: --modalities must"),
        ({"validation_share": 1.0}, r"validation_share must be between 0 and 1, but is 1\.0"),
        ({"align": "rate", "rates": (30.0,)}, "rates must be a number above 0 for each of rgb de"),
        ({"align": "rate", "rates": (30.0, 0.0)}, r"rates must be .* but are 30\.0 0\.0 with"),
        ({"rates": (30.0, 30.0)}, "rates must be .* with --align span"),
        ({"sensor_maximum": 0}, "sensor_maximum must be 1 or more, but is 0"),
        ({"lists": Path("nowhere")}, r"nowhere has no train\.txt"),
    ],
)
def test_options_out_of_their_range_are_named(
    tmp_path: Path, changed: Mapping[str, Any], message: str
) -> None:
    miniature.clips(tmp_path, LISTS, KINDS)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        options(**changed).load(tmp_path, 0)


def test_one_sample_of_each_class_leaves_none_for_validation(tmp_path: Path) -> None:
    miniature.clips(tmp_path, {"train.txt": ["a 0", "b 1"], "test.txt": ["c 0"]}, KINDS)
    with pytest.raises(ValueError, match=r"no class has two .* provide validation\.txt"):
        options().load(tmp_path, 0)


def test_a_fixed_range_ends_at_the_sensor_s_maximum(tmp_path: Path) -> None:
    miniature.clips(tmp_path, LISTS, KINDS)
    clips = options(color_range="fixed", sensor_maximum=2000)
    assert clips._transform().maximum == {"rgb": 2000, "depth": 2000}
    dark, bright = (
        options(color_range="fixed", sensor_maximum=most).load(tmp_path, 0).test[0].inputs[1]
        for most in (60000, 1000)
    )
    assert dark[:, 0].max() < -2 < 0 < bright[:, 0].max()  # red ends the map


@pytest.mark.parametrize("rule", ["span", "rate"])
def test_the_converted_form_gives_the_same_samples(tmp_path: Path, rule: str) -> None:
    raw, folder = tmp_path / "raw", tmp_path / "converted"
    miniature.clips(raw, {**LISTS, "classes.txt": ["sit", "stand"]}, RAW)
    rates = {"rgb": 30.0, "depth": 20.0, "thermal": 10.0, "ir": 15.0}

    def chosen(modalities: Sequence[str], told: bool = True) -> ClipsOptions:
        given = tuple(rates[name] for name in modalities)
        by_rate = {"align": "rate", "rates": given if told else None} if rule == "rate" else {}
        return options(modalities=tuple(modalities), **by_rate)

    size = chosen(list(RAW))._transform().read_size
    assert prepare(chosen(list(RAW)), raw, folder, size, 95, 2, 1).complete
    for modalities in (list(RAW), ["depth", "rgb"], ["thermal", "ir", "depth"], ["ir", "thermal"]):
        expected = chosen(modalities).load(raw, 0)
        found = chosen(modalities, told=modalities == list(RAW)).load(folder, 0)
        assert (found.classes, found.forms) == (expected.classes, expected.forms)
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(found, part), getattr(expected, part)
            assert names(ours) == names(theirs)
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert numbers_of(ours) == numbers_of(theirs)
            for modality, x, y in zip(modalities, ours[0].inputs, theirs[0].inputs, strict=True):
                difference = (x - y).abs()
                exact = modality in ("depth", "thermal")
                assert difference.max() == 0 if exact else difference.mean() < 0.3


@pytest.mark.parametrize("rule", ["span", "rate"])
def test_what_a_damaged_modality_needs_is_not_stored(tmp_path: Path, rule: str) -> None:
    raw, folder = tmp_path / "raw", tmp_path / "converted"
    miniature.clips(raw, LISTS, {"rgb": ("avi", 21), "depth": ("16-bit", 13), "ir": ("avi", 9)})
    (raw / "depth" / "a" / "000000.png").write_bytes(b"")
    by_rate = {"align": "rate", "rates": (30.0, 20.0, 9.0)} if rule == "rate" else {}
    modalities = ("rgb", "depth", "ir")
    chosen = options(modalities=modalities, allow_missing=True, **by_rate)
    report = prepare(chosen, raw, folder, 37, 95, 2, 1)
    assert [(problem.sample, problem.modality) for problem in report.problems] == [("a", "depth")]
    assert verify(folder, 1) == (6, [])
    assert "a" not in names(chosen.load(folder, 0).train)


def test_names_too_long_for_a_tar_are_named(tmp_path: Path) -> None:
    raw, name = tmp_path / "raw", "/".join(["x" * 90] * 3)
    miniature.clips(raw, {**LISTS, "train.txt": [f"{name} 0", "a 1"]}, KINDS)
    with pytest.raises(ValueError, match=rf"'{name}\.json' cannot be a file in a tar: .* shorten"):
        prepare(options(), raw, tmp_path / "converted", 37, 95, 9, 1)


def test_options_survive_a_run_s_configuration() -> None:
    arguments = ["--data", "clips", "--align", "rate", "--rates", "30", "12.5", "--lists", "fold"]
    arguments += ["--device", "cpu"]
    chosen = parsing.parse(arguments, "test")
    assert chosen.data == ClipsOptions(align="rate", rates=(30.0, 12.5), lists=Path("fold"))
    assert parsing.parse_config(chosen.config(), "here") == chosen


def numbers_of(split: ClipSplit) -> list[list[int]]:
    """The numbers of the frames that are read of the first sample, by their indices."""
    clip = split.clips[0]
    tracks = {modality: clip.track(modality, split.rule) for modality in split.modalities}
    return list(align(tracks, split.rule, split.sampling).values())


def test_the_converted_form_is_one_of_its_own_options(tmp_path: Path) -> None:
    raw, folder = tmp_path / "raw", tmp_path / "converted"
    miniature.clips(raw, LISTS, {"rgb": ("avi", 9), "depth": ("grey.mkv", 9)})
    by_rate = options(align="rate")
    assert prepare(by_rate, raw, folder, 37, 95, 2, 1).complete
    with pytest.raises(ValueError, match=r"^--align span does not fit --root .* --align rate"):
        options().load(folder, 0)
    with pytest.raises(ValueError, match=r"--rates has 15 for depth, but .* converted with 30"):
        options(align="rate", rates=(30.0, 15.0)).load(folder, 0)
    data = by_rate.load(folder, 0)
    clip = data.test.clips[0]  # type: ignore[attr-defined]
    assert clip.track("rgb", "rate") == Track(9, 30.0)
    again = options(align="rate", modalities=("depth", "rgb"), stride=4).load(folder, 0)
    assert torch.equal(again.test[0].inputs[1], data.test[0].inputs[0])
    assert data.test.sampling == Sampling(4)  # type: ignore[attr-defined]


def test_other_lists_are_other_parts_of_the_same_conversion(tmp_path: Path) -> None:
    raw, folder, fold = tmp_path / "raw", tmp_path / "converted", tmp_path / "fold"
    miniature.clips(raw, LISTS, KINDS)
    assert prepare(options(), raw, folder, 37, 95, 2, 1).complete
    fold.mkdir()
    (fold / "train.txt").write_text("e walk\nf run\nc walk\n")
    (fold / "val.txt").write_text("d run\n")
    (fold / "test.txt").write_text("a run\nnew walk\n")
    with pytest.raises(ValueError, match=r"1 of 2 test samples lack a modality: new \(no rgb, d"):
        options(lists=fold).load(folder, 0)
    for root in (raw, folder):
        data = options(lists=fold, allow_missing=True).load(root, 0)
        assert data.classes == ("run", "walk")
        assert [names(part) for part in (data.train, data.validation, data.test)] == [
            *(["c", "e", "f"], ["d"], ["a"]),
        ]
        assert data.train.labels.tolist() == [1, 1, 0]
    assert "new (test): has no rgb" in check(options(lists=fold), folder).wrong[0]
