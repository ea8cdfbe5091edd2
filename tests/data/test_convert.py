from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.sources import made_clips

from mmixer_kernels.data import convert, images, shards
from mmixer_kernels.data.clips import Clip
from mmixer_kernels.data.shards import Conversion
from mmixer_kernels.errors import UserError

FRAMES = {"rgb": 17, "depth": 17}
CONVERSION = Conversion("ntu60", ("rgb", "depth"), {"stride": 8}, 24, 95, 2, {})


def run(folder: Path, clips: list[Clip], workers: int = 1, allow: bool = False) -> convert.Report:
    return convert.convert(clips, [], "abc", CONVERSION, folder, workers, allow)


def contents(folder: Path) -> dict[str, bytes]:
    """All that must not depend on how a conversion came about."""
    paths = [path for path in folder.iterdir() if path.name not in (".lock", "report.json")]
    return {path.name: path.read_bytes() for path in paths}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    report = run(folder, made_clips(7, FRAMES))
    assert (report.samples, report.pictures) == (7, {"rgb": 21, "depth": 21})
    assert (report.shards, report.kept, report.problems) == (4, 0, [])
    return folder


def test_the_bytes_do_not_depend_on_the_processes(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, made_clips(7, FRAMES), workers=2).complete
    assert contents(tmp_path) == contents(whole)


def die_in(name: str, calls: int, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Kills this process in the given call of a function."""
    inner: Callable[..., Any] = getattr(module, name)
    left = iter(range(calls - 1))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (images, "encode", 1),
        (images, "encode", 20),
        (convert, "_write", 3),  # a shard's table
        (convert, "_wrong", 1),
        (os, "replace", 1),
        (os, "replace", 4),
        (os, "replace", 10),  # the index
    ],
)
def test_a_killed_conversion_ends_in_the_same_bytes(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    calls: int,
) -> None:
    child = os.fork()
    if child == 0:
        try:
            die_in(name, calls, monkeypatch, module)
            run(tmp_path, made_clips(7, FRAMES))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "index.json").exists()
    finished = len(list(tmp_path.glob("shard-*.json")))
    assert run(tmp_path, made_clips(7, FRAMES)).kept == finished
    assert contents(tmp_path) == contents(whole)


def test_finished_shards_are_kept_when_they_have_their_checksum(
    whole: Path, tmp_path: Path
) -> None:
    run(tmp_path, made_clips(7, FRAMES))
    kept = tmp_path / "shard-000000.tar"
    before = kept.stat().st_ino
    flip(tmp_path / "shard-000001.tar", 600)
    (tmp_path / "shard-000002.json").write_text("{")
    assert run(tmp_path, made_clips(7, FRAMES)).kept == 2
    assert kept.stat().st_ino == before
    assert contents(tmp_path) == contents(whole)


def test_missing_and_damaged_files_are_all_named(whole: Path, tmp_path: Path) -> None:
    spoiled = made_clips(7, FRAMES, damaged=(2, "depth"), missing=(4, "rgb"))
    report = run(tmp_path, spoiled)
    assert [tuple(problem) for problem in report.problems] == [
        ("clip002", "depth", "2.depth: cannot be decoded"),
        ("clip004", "rgb", "there is no rgb of clip004"),
    ]
    assert not report.complete
    assert not (tmp_path / "index.json").exists()
    written = json.loads((tmp_path / "report.json").read_text())
    assert [problem["sample"] for problem in written["problems"]] == ["clip002", "clip004"]
    # Repaired files are found, and nothing else is made anew.
    assert run(tmp_path, spoiled).kept == 4
    assert run(tmp_path, made_clips(7, FRAMES)).kept == 2
    assert contents(tmp_path) == contents(whole)


def test_on_demand_samples_stay_without_what_is_missing(tmp_path: Path) -> None:
    spoiled = made_clips(7, FRAMES, damaged=(2, "depth"), missing=(4, "rgb"))
    assert run(tmp_path, spoiled, allow=True).complete
    answer = shards.clips(
        tmp_path, "ntu60", ("rgb", "depth"), CONVERSION.sampled(), CONVERSION.size, {}
    )
    assert answer is not None
    assert [list(clip.sources) for clip in answer[0]] == [
        *(2 * [["rgb", "depth"]]),
        ["rgb"],
        ["rgb", "depth"],
        ["depth"],
        *(2 * [["rgb", "depth"]]),
    ]


def test_more_samples_are_added_and_end_in_an_index_again(tmp_path: Path) -> None:
    assert run(tmp_path, made_clips(5, FRAMES)).complete
    spoiled = made_clips(7, FRAMES, damaged=(6, "rgb"))
    assert run(tmp_path, spoiled).kept == 2
    assert not (tmp_path / "index.json").exists()
    assert run(tmp_path, made_clips(7, FRAMES)).complete


def test_shards_are_not_made_anew_without_what_they_have(tmp_path: Path) -> None:
    run(tmp_path, made_clips(3, FRAMES))
    before = contents(tmp_path)
    for clips, message in (
        (made_clips(2, FRAMES), "has clip002, .* no rgb and no depth of it"),
        (made_clips(3, FRAMES, missing=(1, "depth")), "has clip001, .* no depth of it"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, clips)
    assert contents(tmp_path) == before


def test_another_conversion_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, made_clips(3, FRAMES))
    other = Conversion(**{**CONVERSION.table(), "sampling": {"stride": 4}, "quality": 90})
    with pytest.raises(UserError, match=r"sampling was .*8.*, is .*4.*; quality was 95, is 90"):
        convert.convert(made_clips(3, FRAMES), [], "abc", other, tmp_path, 1, False)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="has files that are not a conversion's"):
        run(tmp_path, made_clips(3, FRAMES))
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["thesis.tex"]


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    with (
        convert._locked(tmp_path),
        pytest.raises(UserError, match="another prepare is writing to"),
    ):
        run(tmp_path, made_clips(3, FRAMES))


def damage(folder: Path, kind: str) -> None:
    tar = folder / "shard-000001.tar"
    sample = shards.read_json(folder / "shard-000001.json")["samples"][1]
    index, offset, length, _ = sample["places"]["depth"][1]
    assert (sample["name"], index) == ("clip003", 8)
    if kind == "picture":
        flip(tar, offset + length // 2)
    elif kind == "header":
        flip(tar, offset - 512)
    elif kind == "truncated":
        os.truncate(tar, offset + 1)
    elif kind == "missing":
        tar.unlink()
    elif kind == "table":
        flip(tar.with_suffix(".json"), 10)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("picture", r"shard-000001\.tar: does not .* damaged: clip003\.depth\.00008\.png$"),
        ("header", r"shard-000001\.tar: does not .* damaged: nothing but what lies between$"),
        ("truncated", r"shard-000001\.tar: has \d+ bytes.*: clip003\.depth\.00008\.png, clip003"),
        ("missing", r"shard-000001\.tar: is missing$"),
        ("table", r"shard-000001\.json: does not have the checksum of index\.json$"),
    ],
)
def test_verification_names_what_is_damaged(tmp_path: Path, kind: str, message: str) -> None:
    run(tmp_path, made_clips(5, FRAMES))
    assert convert.verify(tmp_path, 1) == (5, [])
    damage(tmp_path, kind)
    samples, wrong = convert.verify(tmp_path, 1)
    assert samples == 5
    assert len(wrong) == 1
    assert re.search(message, wrong[0]), wrong


def test_verification_counts_pictures(tmp_path: Path) -> None:
    run(tmp_path, made_clips(2, FRAMES))
    conversion = tmp_path / "conversion.json"
    conversion.write_text(conversion.read_text().replace('"stride":8', '"stride":4'))
    _, wrong = convert.verify(tmp_path, 1)
    assert [line.partition(": ")[2] for line in wrong] == [
        f"the pictures of clip00{i} are not those that the sampling takes" for i in (0, 1)
    ]
