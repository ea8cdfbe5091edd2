"""The text files that name samples, their classes and the split they belong to.

`train.txt`, `test.txt` and, if there is one, `validation.txt` (or `val.txt`, `valid.txt`) have a
line per sample, `name label` or, as public code for RGB-D video has it, `name frames label`.
Columns are separated by tabs where the line has one, and by blanks otherwise: names and labels with
blanks need tabs. A name is a path below a modality's folder, with or without the ending of a video.
`frames` is a number of frames that each modality of the sample has at least.

A label is the number of a class, from 0, or a class's name, in all lists alike. `classes.txt`, if
there is one, has the classes' names, a line each in the order of their numbers. Without it the
classes are those of train.txt: numbers without gaps, or names in alphabetical order.

Where there is a list for validation but none for the test, as public code leaves it, that list is
the test's.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .base import UNKNOWN
from .clips import Listed
from .decode import VIDEO_ENDINGS

NAMES = {
    "train": ("train.txt",),
    "validation": ("validation.txt", "val.txt", "valid.txt"),
    "test": ("test.txt",),
}
MOST_FAULTS = 5
"""Faults that are named; the others are counted."""


class Entry(NamedTuple):
    """A sample of a list."""

    name: str
    label: int
    listed: Listed


class Lists(NamedTuple):
    """The lists of a data set: its samples by part, of which "validation" may be missing; the names
    of the classes; and `notes`, what a user is to know."""

    parts: dict[str, list[Entry]]
    classes: tuple[str, ...]
    notes: list[str]


class _Line(NamedTuple):
    name: str
    frames: int | None
    label: str | None
    place: str


def read_lists(folder: Path) -> Lists:
    """The lists in a folder.

    Raises:
        FileNotFoundError: there is no list for training, or none to test on.
        ValueError: lines that are not as this module's documentation has them, a sample that is
            there twice, or several lists for validation; each is named by file and line.
        OSError: a file that cannot be read.
    """
    paths = {}
    for part, names in NAMES.items():
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(map(str, found))} are both there: keep one")
        if found:
            paths[part] = found[0]
    notes = []
    if "test" not in paths and "validation" in paths:
        paths["test"] = paths.pop("validation")
        notes.append(
            f"there is no test.txt, so {paths['test']} is what is tested on, and a share of the "
            "training samples is held out to validate on"
        )
    for part in ("train", "test"):
        if part not in paths:
            raise FileNotFoundError(
                f"{folder} has no {part}.txt: it must have train.txt and test.txt with a line "
                "`name label` per sample; --lists names another folder of lists"
            )
    faults: list[str] = []
    lines = {part: _lines(path, faults, labelled=True) for part, path in paths.items()}
    faults += [
        f"{paths[part]} has no line `name label`: add samples"
        + (", or remove it to hold out a share of those for training" * (part == "validation"))
        for part, found in lines.items()
        if not found and not faults
    ]
    together = [line for part in lines.values() for line in part]
    _check_once(together, faults)
    _check_alike(together, faults)
    _raise(faults)
    classes = _classes(folder, lines)
    _note_classes_without_samples(lines["train"], classes, folder / "classes.txt", notes)
    parts = {part: _entries(found, classes, faults) for part, found in lines.items()}
    _raise(faults)
    return Lists(parts, classes, notes)


def read_new(path: Path, classes: Sequence[str], there: Container[str] = ()) -> list[Entry]:
    """The samples of a list in which labels may be missing, which are UNKNOWN then: `name`, or a
    line as in other lists.

    Args:
        classes: names of the classes that labels are of.
        there: names of samples. A line that as a whole is one of these is a name, blanks or not.

    Raises:
        ValueError: as in `read_lists`.
        OSError: likewise.
    """
    faults: list[str] = []
    lines = _lines(path, faults, labelled=False, there=there)
    _check_once(lines, faults)
    _check_alike(lines, faults)
    entries = _entries(lines, tuple(classes), faults)
    _raise(faults)
    return entries


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def _lines(
    path: Path, faults: list[str], labelled: bool, there: Container[str] = ()
) -> list[_Line]:
    """The lines of a list that are not blank; what is wrong with others is added to `faults`."""
    lines = []
    for number, text in enumerate(_text(path), 1):
        if not text.strip():
            continue
        place = f"{path}, line {number}"
        text = text.strip()
        columns = [c.strip() for c in text.split("\t")] if "\t" in text else text.split()
        if _name(text) in there:
            columns = [text]
        name = _name(columns[0])
        if name is None:
            faults.append(f"{place}: {columns[0]!r} must be a path below a modality's folder")
        elif len(columns) == 1 and not labelled:
            lines.append(_Line(name, None, None, place))
        elif len(columns) == 2:
            lines.append(_Line(name, None, columns[1], place))
        elif len(columns) == 3 and columns[1].isdecimal():
            lines.append(_Line(name, int(columns[1]), columns[2], place))
        else:
            faults.append(
                f"{place}: must be `name label` or `name frames label`, with tabs between where a "
                f"name or label has blanks, but is {text!r}"
            )
    return lines


def _name(text: str) -> str | None:
    """A sample's name as `files` has it; None for a path that leads elsewhere."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return str(path.with_suffix("") if path.suffix.lower() in VIDEO_ENDINGS else path)


def _check_once(lines: Sequence[_Line], faults: list[str]) -> None:
    places: dict[str, str] = {}
    for line in lines:
        if line.name in places:
            faults.append(f"{line.place}: {line.name} is in {places[line.name]} already")
        places.setdefault(line.name, line.place)


def _check_alike(lines: Sequence[_Line], faults: list[str]) -> None:
    """Adds a fault where some labels are numbers and some are names."""
    first: dict[bool, _Line] = {}
    for line in lines:
        if line.label is not None:
            first.setdefault(_is_number(line.label), line)
    if len(first) == 2:
        faults.append(
            f"{first[True].place}: labels must be all numbers or all names, but here it is "
            f"{first[True].label!r}, and in {first[False].place} {first[False].label!r}"
        )


def _classes(folder: Path, lines: dict[str, list[_Line]]) -> tuple[str, ...]:
    """The names of the classes."""
    path = folder / "classes.txt"
    if path.is_file():
        named = tuple(name.strip() for name in _text(path) if name.strip())
        if len(set(named)) < len(named) or not named:
            twice = next((name for name in named if named.count(name) > 1), None)
            raise ValueError(
                f"{path} must name each class once, but "
                + (f"{twice!r} is there twice" if named else "has none")
            )
        return named
    found = {line.label for line in lines["train"] if line.label is not None}
    if not all(map(_is_number, found)):
        return tuple(sorted(found))
    numbers = {int(label) for label in found}
    names = range(max(numbers, default=-1) + 1)
    missing = next((number for number in names if number not in numbers), None)
    if missing is not None:
        raise ValueError(
            f"{folder / 'train.txt'} must have a sample of each class in 0..{names[-1]}, but none "
            f"has {missing}: number the classes from 0 without gaps, or name them in classes.txt"
        )
    return tuple(map(str, names))


def _note_classes_without_samples(
    lines: Sequence[_Line], classes: tuple[str, ...], path: Path, notes: list[str]
) -> None:
    """Adds a note on classes that the training has no sample of, as where labels count from 1."""
    labels = {line.label for line in lines if line.label is not None}
    numbers = {int(label) for label in labels if _is_number(label)}
    lacking = [
        name
        for number, name in enumerate(classes)
        if (number not in numbers if numbers else name not in labels)
    ]
    if lacking:
        notes.append(
            f"{len(lacking):,} classes of {path} have no training sample: "
            f"{', '.join(lacking[:MOST_FAULTS])}{', ...' * (len(lacking) > MOST_FAULTS)} "
            "(labels that are numbers count from 0)"
        )


def _entries(lines: Sequence[_Line], classes: tuple[str, ...], faults: list[str]) -> list[Entry]:
    """The samples of lines; labels that are no class's are added to `faults`."""
    entries = []
    by_number = all(_is_number(line.label) for line in lines if line.label is not None)
    places = {name: place for place, name in enumerate(classes)}
    for line in lines:
        label: int | None = UNKNOWN
        if line.label is not None and by_number:
            label = int(line.label) if 0 <= int(line.label) < len(classes) else None
        elif line.label is not None:
            label = places.get(line.label)
        if label is None:
            shown = ", ".join(classes[:MOST_FAULTS]) + (", ..." * (len(classes) > MOST_FAULTS))
            faults.append(
                f"{line.place}: label must be a class of the training, in 0..{len(classes) - 1} "
                f"or one of {shown}, but is {line.label!r}"
            )
        else:
            entries.append(Entry(line.name, label, Listed(line.place, line.frames)))
    return entries


def _is_number(label: str | None) -> bool:
    return label is not None and re.fullmatch(r"-?\d+", label) is not None


def _raise(faults: Sequence[str]) -> None:
    if faults:
        more = len(faults) - MOST_FAULTS
        raise ValueError(
            "; ".join(faults[:MOST_FAULTS]) + (f"; and {more:,} more faults" if more > 0 else "")
        )
