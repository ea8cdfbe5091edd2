from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data import miniature

from mmixer_kernels import prepare
from mmixer_kernels.data import ClipsOptions, Ntu60Options, NwUclaOptions
from mmixer_kernels.data.clips import ClipSplit

SAMPLES = 24
"""More than two processes can convert in the moment between a look and a kill."""


def run(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    miniature.ntu(root, actions=range(1, 1 + SAMPLES // 3), modalities=("rgb", "depth", "ir"))
    return root


def options(raw: Path, output: Path, workers: int = 1) -> list[str]:
    return [
        *("--data", "ntu60", "--root", str(raw), "--output", str(output)),
        *("--modalities", "rgb", "depth", "ir", "--samples-per-shard", "1"),
        *("--workers", str(workers)),
    ]


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(*options(raw, folder)) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.iterdir() if path.name not in (".lock", "report.json")]
    return {path.name: path.read_bytes() for path in paths}


def started(raw: Path, output: Path) -> subprocess.Popen[str]:
    """A conversion in two processes that has finished its first shard."""
    command = [sys.executable, "-m", "mmixer_kernels.prepare", *options(raw, output, workers=2)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(output.glob("shard-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return process


def children(process: subprocess.Popen[str]) -> list[Path]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [Path(f"/proc/{child}") for child in listed.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_a_killed_conversion_goes_on_to_the_same_bytes(
    raw: Path, whole: Path, tmp_path: Path
) -> None:
    process = started(raw, tmp_path)
    orphans = children(process)
    assert len(orphans) >= 2
    process.kill()
    process.wait()  # not for the end of its stderr, which the others have too
    assert not (tmp_path / "index.json").exists()
    deadline = time.monotonic() + 10
    while any(orphan.exists() for orphan in orphans):
        assert time.monotonic() < deadline, "processes outlive the one that started them"
        time.sleep(0.01)
    finished = len(list(tmp_path.glob("shard-*.json")))
    assert 0 < finished < SAMPLES
    assert run(*options(raw, tmp_path)) == 0
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == finished
    assert contents(tmp_path) == contents(whole)


def test_a_stopped_conversion_tells_how_to_go_on(raw: Path, whole: Path, tmp_path: Path) -> None:
    process = started(raw, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which reaches all processes
    error = process.communicate()[1]
    assert process.returncode == 130
    assert "stopped by SIGINT; go on with: python -m mmixer_kernels.prepare" in error
    assert "Traceback" not in error
    assert not (tmp_path / "index.json").exists()
    again = error.rpartition("mmixer_kernels.prepare ")[2].split()
    assert run(*again, "--workers", 1) == 0
    assert contents(tmp_path) == contents(whole)


def frames(split: ClipSplit, index: int) -> list[list[int]]:
    clip = split.clips[index]
    counts = min(source.count() for source in clip.sources.values())
    return [
        [
            miniature.number(frame)
            for frame in clip.sources[modality].read(split.sampling(counts), 256)
        ]
        for modality in split.modalities
    ]


@pytest.mark.parametrize("modalities", [("rgb", "depth", "ir"), ("ir", "depth")])
def test_training_reads_either_form(raw: Path, whole: Path, modalities: tuple[str, ...]) -> None:
    from_raw, from_shards = (
        Ntu60Options(modalities=modalities).load(root, 0)  # type: ignore[arg-type]
        for root in (raw, whole)
    )
    for part in ("train", "validation", "test"):
        expected, found = getattr(from_raw, part), getattr(from_shards, part)
        assert [clip.name for clip in found.clips] == [clip.name for clip in expected.clips]
        assert found.labels.tolist() == expected.labels.tolist()
        for index in (0, len(expected) - 1):
            assert frames(found, index) == frames(expected, index)
        for modality, ours, theirs in zip(
            modalities, found[0].inputs, expected[0].inputs, strict=True
        ):
            difference = (ours - theirs).abs()
            assert ours.shape == theirs.shape
            assert difference.max() == 0 if modality == "depth" else difference.mean() < 0.1


def test_nw_ucla_too(tmp_path: Path) -> None:
    miniature.nw_ucla(tmp_path / "raw")
    output = tmp_path / "converted"
    arguments = ("--data", "nw-ucla", "--root", tmp_path / "raw", "--output", output)
    assert run(*arguments, "--frames", "4", "--workers", "1") == 0
    expected, found = (NwUclaOptions(frames=4).load(root, 0) for root in (tmp_path / "raw", output))
    for part in ("train", "validation", "test"):
        names = [[clip.name for clip in getattr(data, part).clips] for data in (found, expected)]
        assert names[0] == names[1]
    assert frames(found.test, 0) == frames(expected.test, 0)  # type: ignore[arg-type]


def test_recordings_of_ones_own_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = tmp_path / "raw", tmp_path / "converted"
    lists = {
        "lists/train.txt": ["a 0", "b 0", "c 1"],
        "lists/test.txt": ["d 1"],
        "lists/val.txt": ["e 1"],
    }
    miniature.clips(root, lists, {"rgb": ("avi", 9), "flow": ("png", 18)})
    chosen = ["--data", "clips", "--root", root, "--output", output, "--workers", 1]
    by_rate = ["--lists", root / "lists", "--align", "rate", "--rates", 10, 20]
    assert run(*chosen, *by_rate, "--modalities", "rgb", "flow") == 0
    options = ClipsOptions(modalities=("flow", "rgb"), align="rate")
    data = options.load(output, 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [3, 1, 1]
    assert data.test[0].length == 3
    assert run("--verify", "--output", output) == 0
    (root / "flow" / "b" / "000003.png").write_bytes(b"")
    again = tmp_path / "again"
    chosen[5] = again
    assert run(*chosen, *by_rate, "--modalities", "rgb", "flow", "--stride", 1) == 1
    assert f"b: flow: {root}/flow/b/000003.png: cannot be decoded" in capsys.readouterr().err
    assert not (again / "index.json").exists()


def test_damaged_files_are_named_and_end_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "raw", tmp_path / "converted"
    cut, without = "S001C001P003R001A001", "S001C001P002R001A001"
    miniature.ntu(root, damage=[(cut, "rgb", "truncated"), (without, "depth", "missing")])
    arguments = ["--data", "ntu60", "--root", root, "--output", output, "--workers", 1]
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert f"{cut}: rgb: " in error
    assert f"{cut}_rgb.avi" in error
    assert f"{without}: depth: there is no depth" in error
    assert "2 files above are missing or damaged" in error
    with pytest.raises(ValueError, match="its conversion has not ended"):
        Ntu60Options().load(output, 0)

    assert run(*arguments, "--allow-missing") == 0
    # The test set asks again, as in the raw form; training goes on without the sample.
    with pytest.raises(ValueError, match=f"1 of 2 test samples lack a modality: {cut}"):
        Ntu60Options().load(output, 0)
    data = Ntu60Options(allow_missing=True).load(output, 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [1, 2, 1]


def test_verify_needs_no_raw_data(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    assert run("--verify", "--output", tmp_path, "--workers", "1") == 0
    assert f"{SAMPLES} samples are as they were written" in capsys.readouterr().out
    path = tmp_path / "shard-000003.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert run("--verify", "--output", tmp_path, "--workers", "1") == 1
    assert f"{path}: does not have the checksum" in capsys.readouterr().err


def test_mistakes_end_in_one_line(
    raw: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--output", tmp_path], "--data and --root must say what to convert"),
        ([*options(raw, tmp_path), "--align", "rate"], "--align is for clips: leave it out for"),
        ([*options(raw, tmp_path), "--modalities", "rgb", "smell"], "modalities must be two or"),
        ([*options(raw, tmp_path), "--stride", "0"], "--stride must be 1 or more, but is 0"),
        ([*options(raw, tmp_path), "--quality", "101"], "--quality must be in 1..100, but is 101"),
        (options(whole, tmp_path / "new"), "is a converted folder already"),
        (options(tmp_path / "empty", tmp_path / "new"), "holds no rgb or depth or ir"),
        ([*options(raw, whole), "--stride", "4"], "holds a conversion with other options"),
        (["--verify", "--output", tmp_path], "has no conversion.json"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert message in error
