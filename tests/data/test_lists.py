"""Lists of samples: what is read, and the file and line of what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmixer_kernels.data import lists
from mmixer_kernels.data.base import UNKNOWN
from mmixer_kernels.data.lists import Lists, read_lists, read_new


def read(root: Path, **files: str) -> Lists:
    for name, text in files.items():
        (root / f"{name}.txt").write_text(text)
    return read_lists(root)


def samples(found: Lists, part: str) -> list[tuple[str, int]]:
    return [(entry.name, entry.label) for entry in found.parts[part]]


def test_numbers_are_classes(tmp_path: Path) -> None:
    found = read(tmp_path, train="a 1\n\nwalk/b.MP4 0\n", validation="c/ 1", test="./d 0\n")
    assert found.classes == ("0", "1")
    assert samples(found, "train") == [("a", 1), ("walk/b", 0)]
    assert samples(found, "validation") == [("c", 1)]
    assert samples(found, "test") == [("d", 0)]
    listed = found.parts["train"][1].listed
    assert listed == (f"{tmp_path}/train.txt, line 3", None)
    assert found.notes == []


def test_public_code_s_lines_have_a_number_of_frames(tmp_path: Path) -> None:
    found = read(tmp_path, train=" r0/ 80 0 \nr1/ 81 1 \n", test="r2 7 1\n", val="v1.5 3 0\n")
    assert samples(found, "train") == [("r0", 0), ("r1", 1)]
    assert samples(found, "validation") == [("v1.5", 0)]
    assert [entry.listed.frames for entry in found.parts["train"]] == [80, 81]


def test_names_are_classes(tmp_path: Path) -> None:
    found = read(tmp_path, train="\ufeffa walk\nb 9 run\n", test="my clip.avi\twalk\n")
    assert found.classes == ("run", "walk")
    assert samples(found, "train") == [("a", 1), ("b", 0)]
    assert samples(found, "test") == [("my clip", 1)]


@pytest.mark.parametrize("labels", [("2", "0"), ("sit down", "walk")])
def test_classes_are_named_in_the_order_of_their_numbers(
    tmp_path: Path, labels: tuple[str, str]
) -> None:
    train = "".join(f"{name}\t{label}\n" for name, label in zip("ab", labels, strict=True))
    found = read(tmp_path, train=train, test="c\t" + labels[0], classes="walk\nrun\nsit down\n\n")
    assert found.classes == ("walk", "run", "sit down")
    assert samples(found, "train") == [("a", 2), ("b", 0)]
    assert samples(found, "test") == [("c", 2)]


def test_a_list_for_validation_alone_is_the_test_s(tmp_path: Path) -> None:
    found = read(tmp_path, train="a 0\nb 0\n", valid="c 0\n")
    assert found.parts.keys() == {"train", "test"}
    assert samples(found, "test") == [("c", 0)]
    (note,) = found.notes
    assert f"{tmp_path}/valid.txt is what is tested on" in note


FAULTS = [
    ({"train": "a 0\nb\n"}, r"train\.txt, line 2: must be `name label` or .* but is 'b'"),
    ({"train": "my clip 0\n"}, r"train\.txt, line 1: must be .* tabs .* but is 'my clip 0'"),
    ({"train": "a 5 0 1\n"}, r"train\.txt, line 1: must be "),
    ({"train": "a 0\n/b 0\n"}, r"train\.txt, line 2: '/b' must be a path below a modality's"),
    ({"test": "../b 0\n"}, r"test\.txt, line 1: '../b' must be a path below"),
    ({"train": "a 0\nc 0\na 0\n"}, r"train\.txt, line 3: a is in .*train\.txt, line 1 already"),
    ({"train": "a 0\na.mp4 0\n"}, r"train\.txt, line 2: a is in .*train\.txt, line 1 already"),
    ({"test": "b 0\na 0\n"}, r"test\.txt, line 2: a is in .*train\.txt, line 1 already"),
    ({"val": "a 0\n"}, r"val\.txt, line 1: a is in .*train\.txt, line 1 already"),
    ({"train": "a 0\nc 2\n"}, r"train\.txt must have a sample of each .* 0\.\.2, but none has 1"),
    ({"train": "a 1\nc 2\n"}, r"train\.txt must have a sample of each .* 0\.\.2, but none has 0"),
    ({"test": "b 1\n"}, r"test\.txt, line 1: label must be .* 0\.\.0 or one of 0, but is '1'"),
    ({"test": "b -1\n"}, r"test\.txt, line 1: label must be .* but is '-1'"),
    ({"train": "a walk\n", "test": "b run\n"}, r"test\.txt, line 1: .* one of walk, but is 'run'"),
    ({"train": "a walk\n", "test": "b 0\n"}, r"test\.txt, line 1: labels must be all numbers or"),
    ({"train": "a 0\nb 1a\n"}, r"train\.txt, line 1: .* '0', and in .* line 2 '1a'"),
    ({"classes": "x\ny\n", "train": "a 2\n"}, r"train\.txt, line 1: .* 0\.\.1 or one of x, y, but"),
    ({"classes": "x\ny\nx\n"}, r"classes\.txt must name each class once, but 'x' is there twice"),
    ({"classes": "\n"}, r"classes\.txt must name each class once, but has none"),
    ({"val": "c 0\n", "validation": "c 0\n"}, r"validation\.txt and .*/val\.txt are both there"),
]


@pytest.mark.parametrize(("changed", "message"), FAULTS)
def test_faults_are_named_by_file_and_line(
    tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **{"train": "a 0\n", "test": "b 0\n", **changed})


def test_several_faults_are_named_together(tmp_path: Path) -> None:
    many = "".join(f"{number}\n" for number in range(lists.MOST_FAULTS + 2))
    with pytest.raises(ValueError, match=r"line 1: .*; .*line 5: .*; and 2 more faults$"):
        read(tmp_path, train=many, test="b 0\n")


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("b 0\n")
    (tmp_path / "train.txt").write_bytes(b"caf\xe9 0\n")
    with pytest.raises(ValueError, match=r"train\.txt must be text in UTF-8"):
        read_lists(tmp_path)


def test_missing_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no train.txt"):
        read_lists(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no test.txt"):
        read(tmp_path, train="a 0\n")


def test_new_samples_may_have_no_label(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_text("a\nmy/b.avi run\nc 12 walk\n")
    found = read_new(path, ("run", "walk"))
    assert [(entry.name, entry.label) for entry in found] == [
        *(("a", UNKNOWN), ("my/b", 0), ("c", 1)),
    ]
    path.write_text("a 1\n")
    assert read_new(path, ("run", "walk"))[0].label == 1
    for text, message in (("a sit\n", "line 1: label must be"), ("a\na\n", "line 2: a is in")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_new(path, ("run", "walk"))


def test_lists_without_samples_are_named(tmp_path: Path) -> None:
    for part in ("train", "test", "validation"):
        files = {"train": "a 0\n", "test": "b 0\n", "validation": "c 0\n", part: "\n"}
        with pytest.raises(ValueError, match=rf"{part}\.txt has no line `name label`: add samples"):
            read(tmp_path, **files)


def test_classes_without_training_samples_are_noted(tmp_path: Path) -> None:
    for label in ("1", "sit"):  # as where someone counts from 1
        found = read(tmp_path, classes="stand\nsit\n", train=f"a {label}\n", test=f"b {label}\n")
        (note,) = found.notes
        assert note.startswith(
            f"1 classes of {tmp_path}/classes.txt have no training sample: stand"
        )
