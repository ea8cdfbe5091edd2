"""Converts the clips of a data set to the shards that `shards` describes, and verifies them.

A shard is the unit of work: one process makes it, beside its name, and renames it. So a conversion
that was stopped in any way finds each shard whole or makes it anew, and its bytes do not depend on
the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..atomic import replacing
from ..errors import DamagedFile, UserError
from . import images, processes, shards
from .alignment import Track, needed
from .clips import Clip
from .processes import Step
from .shards import Conversion
from .transforms import Sampling
from .video import VideoOptions

LOCK = ".lock"
BEGINNING = (LOCK, "conversion.json.part")
"""Files of a conversion that was killed before there was conversion.json."""
NAMED = 3
"""Damaged pictures of a shard that are named; the others are counted."""


class Problem(NamedTuple):
    """A modality of a sample that is missing or damaged, and so is not converted."""

    sample: str
    modality: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The outcome of a conversion; report.json has the same."""

    samples: int
    pictures: dict[str, int]
    """Numbers of pictures by modality."""
    shards: int
    kept: int
    """Shards that an earlier run had finished."""
    size: int
    """Bytes of the shards."""
    problems: list[Problem]
    """Modalities that are missing or damaged in the raw data."""
    wrong: list[str]
    """Faults of the shards, found by reading them again after they were written."""
    complete: bool
    """True where there is an index.json, so that the folder can be trained on."""

    def table(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {**asdict(self), "problems": [problem._asdict() for problem in self.problems]}


def convert(
    clips: Sequence[Clip],
    notes: Sequence[str],
    classes: Sequence[str],
    conversion: Conversion,
    output: Path,
    workers: int,
    allow_missing: bool,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Converts clips into a folder, or goes on with a conversion that was stopped.

    Every clip gets its place in a shard with the modalities that it has. Shards that an earlier run
    finished are kept when they have their checksum and when what was missing or damaged still is.

    Args:
        clips: the clips of all splits.
        notes: what a user of the data set is to know, as `video.Listing` has it.
        classes: names of the data set's classes.
        workers: number of processes.
        allow_missing: write index.json even though a modality of a sample is missing or damaged.
        parts: names of the samples by part, where lists tell them.

    Raises:
        UserError: the folder is not this conversion's, has samples that are not among the clips, or
            is being written by another process; a process was killed.
        stop.Interrupted: a signal stopped the conversion.
        OSError: the folder cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        tasks = _plan(clips, conversion, output)
        made = processes.run(_make, tasks, workers, "converted")
        entries = [shard.entry for shard in made]
        problems = [problem for shard in made for problem in shard.problems]
        wrong = _wrong(output, conversion, entries, workers)
        report = Report(
            samples=len(clips),
            pictures={
                modality: sum(entry["pictures"][modality] for entry in entries)
                for modality in conversion.modalities
            },
            shards=len(entries),
            kept=sum(shard.kept for shard in made),
            size=sum(entry["size"] for entry in entries),
            problems=problems,
            wrong=wrong,
            complete=not wrong and (allow_missing or not problems),
        )
        if report.complete:
            index = {"classes": list(classes), "notes": list(notes), "shards": entries}
            if parts is not None:
                index["parts"] = {part: list(names) for part, names in parts.items()}
            _write(output / "index.json", index)
        _write(output / "report.json", report.table())
    return report


def prepare(
    data: VideoOptions,
    root: Path | None,
    output: Path,
    size: int,
    quality: int,
    samples_per_shard: int,
    workers: int,
) -> Report:
    """Converts all samples of a data set under `root`, with the data set's own options.

    Args:
        data: modalities, sampling, which files, and allow_missing.
        root: folder of the raw files.
        size: pixels of the frames' shorter side.
        quality: quality of the JPEGs, 1 to 100.

    Raises:
        ValueError: as in `VideoOptions.listing`, or root is a converted folder.
        FileNotFoundError: as in `VideoOptions.listing`.
        UserError: as in `convert`.
        stop.Interrupted: likewise.
        OSError: likewise.
    """
    if root is not None and shards.is_converted(root):
        raise ValueError(f"--root {root} is a converted folder already: give that of the raw files")
    listing = data.listing(root)
    conversion = Conversion(
        data=data.name,
        modalities=data.modalities,
        sampling=shards.sampling_options(Sampling(data.stride, data.frames)),
        size=size,
        quality=quality,
        samples_per_shard=samples_per_shard,
        source=data.source(),
        forms=listing.forms,
        align=data.rule(),
    )
    return convert(
        listing.clips,
        listing.notes,
        listing.classes,
        conversion,
        output,
        workers,
        data.allow_missing,
        listing.parts,
    )


def verify(folder: Path, workers: int) -> tuple[int, list[str]]:
    """The number of samples of a converted folder, and what is wrong with it: files and pictures
    that do not have their checksum, and counts that are not those of the sampling.

    Raises:
        ValueError: the folder is not a converted one, or not to its end.
        stop.Interrupted: as in `convert`.
        UserError: likewise.
    """
    if not shards.is_converted(folder):
        raise ValueError(f"{folder} has no conversion.json: give the --output of a conversion")
    conversion = Conversion.read(folder)
    entries = shards.read_index(folder)["shards"]
    samples = sum(entry["samples"] for entry in entries)
    return samples, _wrong(folder, conversion, entries, workers)


@dataclass(frozen=True)
class _Task:
    """A shard to make: `folder/name.tar` and `.json`."""

    folder: Path
    name: str
    clips: Sequence[Clip]
    conversion: Conversion

    def __len__(self) -> int:
        return len(self.clips)

    def path(self, suffix: str) -> Path:
        """The shard's file with this suffix, "tar" or "json"."""
        return self.folder / f"{self.name}.{suffix}"


class _Made(NamedTuple):
    """A shard on the disk: its entry in index.json, and whether it was there before."""

    entry: dict[str, Any]
    kept: bool
    problems: list[Problem]


@dataclass(frozen=True)
class _Check:
    """A shard to verify."""

    folder: Path
    conversion: Conversion
    entry: Mapping[str, Any]

    def __len__(self) -> int:
        samples: int = self.entry["samples"]
        return samples


def _plan(clips: Sequence[Clip], conversion: Conversion, output: Path) -> list[_Task]:
    """The shards to make, after what an earlier run left in the folder was found to fit."""
    if not clips:
        raise UserError("there is no sample to convert")
    if shards.is_converted(output):
        _check_conversion(Conversion.read(output), conversion, output)
        _check_samples(clips, output)
    elif any(path.name not in BEGINNING for path in output.iterdir()):
        raise UserError(
            f"--output {output} has files that are not a conversion's: choose an empty folder"
        )
    for part in output.glob("*.part"):
        part.unlink()
    _write(output / "conversion.json", conversion.table())
    (output / "index.json").unlink(missing_ok=True)  # until all shards fit it again
    count = conversion.samples_per_shard
    return [
        _Task(output, f"shard-{number:06}", clips[start : start + count], conversion)
        for number, start in enumerate(range(0, len(clips), count))
    ]


def _check_conversion(before: Conversion, now: Conversion, output: Path) -> None:
    differing = [
        f"{field.name} was {getattr(before, field.name)}, is {getattr(now, field.name)}"
        for field in fields(Conversion)
        if getattr(before, field.name) != getattr(now, field.name)
    ]
    if differing:
        raise UserError(
            f"--output {output} holds a conversion with other options: {'; '.join(differing)}: "
            "pass those it was made with, or choose another folder"
        )


def _check_samples(clips: Sequence[Clip], output: Path) -> None:
    """Refuses to make shards anew without what they have, as when a disk is not mounted."""
    sources = {clip.name: clip.sources for clip in clips}
    for path in sorted(output.glob("shard-*.json")):
        try:
            samples = shards.read_json(path)["samples"]
        except ValueError:
            continue  # a damaged shard is made anew
        for sample in samples:
            lost = [m for m in sample["frames"] if m not in sources.get(sample["name"], {})]
            if lost:
                raise UserError(
                    f"{path} has {sample['name']}, but --root has no {' and no '.join(lost)} of it "
                    "now: complete it, or choose another --output"
                )


def _make(task: _Task, step: Step) -> _Made:
    kept = _finished(task)
    if kept is not None:
        return kept
    problems: list[Problem] = []
    with replacing(task.path("tar")) as file:
        writer = shards.ShardWriter(file, task.conversion)
        for clip in task.clips:
            tracks, pictures, found = _encoded(clip, task.conversion)
            writer.add(clip.name, clip.label, tracks, pictures)
            problems += found
            step()
        writer.close()
    table = {
        "sha256": _sha256(task.path("tar")),
        "samples": writer.samples,
        "problems": problems,
    }
    _write(task.path("json"), table)
    return _Made(_entry(task, table), False, problems)


def _finished(task: _Task) -> _Made | None:
    """The shard that an earlier run made of what there is now."""
    try:
        table = shards.read_json(task.path("json"))
        samples = [(sample["name"], sample["label"]) for sample in table["samples"]]
        problems = [Problem(*problem) for problem in table["problems"]]
        whole = _sha256(task.path("tar")) == table["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not whole or samples != [(clip.name, clip.label) for clip in task.clips]:
        return None
    for clip in task.clips:
        before = [problem for problem in problems if problem.sample == clip.name]
        if (
            before != _missing(clip, task.conversion)
            and before != _encoded(clip, task.conversion)[2]
        ):
            return None
    return _Made(_entry(task, table), True, problems)


def _entry(task: _Task, table: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's entry in index.json."""
    samples = table["samples"]
    return {
        "name": task.name,
        "samples": len(samples),
        "pictures": {
            modality: sum(len(sample["places"].get(modality, ())) for sample in samples)
            for modality in task.conversion.modalities
        },
        "size": task.path("tar").stat().st_size,
        "sha256": table["sha256"],
        "json_size": task.path("json").stat().st_size,
        "json_sha256": _sha256(task.path("json")),
    }


def _missing(clip: Clip, conversion: Conversion) -> list[Problem]:
    return [
        Problem(clip.name, modality, f"there is no {modality} of {clip.name}")
        for modality in conversion.modalities
        if modality not in clip.sources
    ]


def _encoded(
    clip: Clip, conversion: Conversion
) -> tuple[dict[str, Track], dict[str, dict[int, bytes]], list[Problem]]:
    """The original's tracks and the pictures by frame, both by modality, and the modalities that
    are missing or damaged."""
    problems = _missing(clip, conversion)
    tracks: dict[str, Track] = {}
    pictures: dict[str, dict[int, bytes]] = {}
    rule, sampling = conversion.align, conversion.sampled()

    def damaged(modality: str, error: Exception) -> None:
        problems.append(Problem(clip.name, modality, str(error)))
        tracks.pop(modality, None)

    for modality in conversion.modalities:
        if modality in clip.sources:
            try:
                tracks[modality] = clip.track(modality, rule)
            except (DamagedFile, OSError) as error:
                damaged(modality, error)
    for modality, indices in needed(tracks, rule, sampling).items():
        try:
            frames = clip.sources[modality].read(indices, conversion.size)
        except (DamagedFile, OSError) as error:
            damaged(modality, error)
            continue
        pictures[modality] = {
            index: images.encode(frame, conversion.form(modality), conversion.quality)
            for index, frame in zip(indices, frames, strict=True)
        }
    wanted = needed(tracks, rule, sampling)  # without those damaged since
    return (
        tracks,
        {m: {index: pictures[m][index] for index in wanted[m]} for m in tracks},
        problems,
    )


def _wrong(
    folder: Path, conversion: Conversion, entries: Sequence[Mapping[str, Any]], workers: int
) -> list[str]:
    checks = [_Check(folder, conversion, entry) for entry in entries]
    return [line for wrong in processes.run(_check, checks, workers, "verified") for line in wrong]


def _check(check: _Check, step: Step) -> list[str]:
    """The faults of a shard, a line each."""
    entry = check.entry
    tar, table = (check.folder / f"{entry['name']}.{suffix}" for suffix in ("tar", "json"))
    wrong_table = _wrong_file(table, entry["json_size"], entry["json_sha256"])
    if wrong_table is not None:
        return [wrong_table]
    wrong_tar = _wrong_file(tar, entry["size"], entry["sha256"])
    if not tar.exists():
        return [str(wrong_tar)]
    samples = shards.read_json(table)["samples"]
    damaged = []
    with open(tar, "rb") as file:
        for sample in samples:
            damaged += _damaged_pictures(file, sample, check.conversion)
            step()
    if wrong_tar is not None:
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        where = ", ".join(damaged[:NAMED]) + more if damaged else "nothing but what lies between"
        return [f"{wrong_tar}; of its pictures are damaged: {where}"]
    wrong = [f"{name} is not where {table.name} says" for name in damaged]
    wrong += _wrong_members(tar, samples, check.conversion)
    wrong += _wrong_counts(check, samples)
    return [f"{tar}: {line}" for line in wrong]


def _wrong_file(path: Path, size: int, sha256: str) -> str | None:
    if not path.exists():
        return f"{path}: is missing"
    if path.stat().st_size != size:
        return f"{path}: has {path.stat().st_size} bytes, but index.json says {size}"
    if _sha256(path) != sha256:
        return f"{path}: does not have the checksum of index.json"
    return None


def _damaged_pictures(
    file: IO[bytes], sample: Mapping[str, Any], conversion: Conversion
) -> list[str]:
    damaged = []
    for modality, places in sample["places"].items():
        form = conversion.form(modality)
        for index, offset, length, checksum in places:
            file.seek(offset)
            if zlib.crc32(file.read(length)) != checksum:
                damaged.append(shards.member_name(sample["name"], modality, index, form))
    return damaged


def _wrong_members(
    tar: Path, samples: Sequence[Mapping[str, Any]], conversion: Conversion
) -> list[str]:
    expected = []
    for sample in samples:
        name = sample["name"]
        expected.append(f"{name}.json")
        for modality, places in sample["places"].items():
            form = conversion.form(modality)
            expected += [shards.member_name(name, modality, place[0], form) for place in places]
    with tarfile.open(tar) as archive:
        found = archive.getnames()
    return (
        [] if found == expected else [f"has {len(found)} members, not the {len(expected)} listed"]
    )


def _wrong_counts(check: _Check, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    wrong, conversion = [], check.conversion
    if len(samples) != check.entry["samples"]:
        wrong.append(f"has {len(samples)} samples, but index.json says {check.entry['samples']}")
    for sample in samples:
        expected = needed(shards.tracks_of(sample), conversion.align, conversion.sampled())
        found = {m: [place[0] for place in places] for m, places in sample["places"].items()}
        if found != expected:
            wrong.append(f"the pictures of {sample['name']} are not those that the sampling takes")
    return wrong


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, table: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(shards.dumps(table))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second conversion out of the folder while this one is alive."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another prepare is writing to --output {folder}") from error
        except OSError:
            pass  # a file system without locks
        yield
