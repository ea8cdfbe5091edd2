"""The preflight of a data set of video: all its files have to be there and readable."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DamagedFile
from .alignment import Rule, Track
from .clips import Clip
from .decode import NumberedPicturesSource
from .video import PARTS, VideoOptions, first

READ: dict[Rule, str] = {
    "frame": "frames, of which as many as the shortest has are read",
    "span": "frames, which are aligned by their time (--align)",
    "rate": "seconds, of which those that all have are read (--align rate)",
}
"""What a sample's modalities may differ in, and what is read then, by the rule of `alignment`."""


class Found(NamedTuple):
    """A clip's frames by modality, what is wrong with its files, and its folders of
    pictures that may lack some."""

    tracks: dict[str, Track]
    damage: list[str]
    gaps: list[str]


@dataclass
class Report:
    """The findings of a check, in lines to print; `wrong` are those that must be put right."""

    counts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        end = f"{len(self.wrong):,} things are wrong" if self.wrong else "all is well"
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*self.counts, *notes, *self.wrong, end])


def check(
    options: VideoOptions,
    root: Path | None,
    full: bool = False,
    workers: int = 0,
    seed: int = 0,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda clips, total: clips,
) -> Report:
    """Counts samples, looks into every file and compares with the published counts.

    Args:
        root: folder of the data set.
        full: decode every frame; otherwise headers are compared with the number of packets, and
            pictures are looked at for their beginning and end.
        workers: processes; 0 works in this one.
        seed: seed of the parts, where they are drawn by chance.
        progress: given the clips' results as they come, and their number.

    Raises:
        ValueError: as `VideoOptions.listing`.
        FileNotFoundError: likewise.
        ModuleNotFoundError: likewise.
        BrokenProcessPool: a process was killed.
    """
    listing = options.listing(root)
    parts = options.parts(listing, seed)
    part_of = {clip.name: part for part, clips in parts.items() for clip in clips}
    report = Report(_table(options, parts), [*listing.notes, *options.remarks()])
    if listing.forms is not None:
        forms = ", ".join(f"{modality} {form}" for modality, form in listing.forms.items())
        report.notes.append(f"frames are read as {forms}")
    missing = report.notes if options.allow_missing else report.wrong
    missing += _missing(options, parts)
    unequal, longer, gaps = [], [], []
    results = _results(listing.clips, options.rule(), full, workers)
    for clip, found in zip(listing.clips, progress(results, len(listing.clips)), strict=True):
        report.wrong += [f"{clip.name} ({part_of[clip.name]}): {text}" for text in found.damage]
        gaps += found.gaps
        counts = ", ".join(_shown(modality, track) for modality, track in found.tracks.items())
        # Under the rule `rate` alone there are rates, and then lengths are seconds.
        lengths = {track.frames / (track.rate or 1) for track in found.tracks.values()}
        if len(lengths) > 1:
            unequal.append(f"{clip.name} ({counts})")
        listed = clip.listed.frames if clip.listed else None
        if (
            listed is not None
            and max((t.frames for t in found.tracks.values()), default=0) > listed
        ):
            longer.append(f"{clip.name} ({counts}, listed {listed})")
    if unequal:
        report.notes.append(
            f"{len(unequal):,} samples differ in their modalities' {READ[options.rule()]}: "
            f"{first(unequal)}"
        )
    if longer:
        report.notes.append(
            f"{len(longer):,} samples have more frames than their lists say, and all are read: "
            f"{first(longer)}"
        )
    if gaps:
        report.notes.append(
            f"{len(gaps):,} folders have pictures whose numbers do not rise in equal steps, as "
            f"where some are missing: {first(gaps)}"
        )
    return report


def _table(options: VideoOptions, parts: dict[str, list[Clip]]) -> list[str]:
    """A table of the numbers of samples, by part and modality, and with all modalities."""
    rows = {
        modality: [sum(modality in clip.sources for clip in parts[part]) for part in PARTS]
        for modality in options.modalities
    }
    rows["all of them"] = [sum(not options.missing(clip) for clip in parts[part]) for part in PARTS]
    head = f"{options.name:<12}" + "".join(f"{part:>12}" for part in PARTS)
    return [
        head,
        *(f"{name:<12}" + "".join(f"{n:>12,}" for n in row) for name, row in rows.items()),
    ]


def _missing(options: VideoOptions, parts: dict[str, list[Clip]]) -> Iterator[str]:
    found: Counter[str] = Counter()
    for part, clips in parts.items():
        for clip in clips:
            found["test" if part == "test" else "train"] += not options.missing(clip)
            for modality in options.missing(clip):
                place = f" ({clip.listed.place})" if clip.listed else ""
                yield f"{clip.name} ({part}): has no {modality}{place}"
    for split, count in options.published().items():
        if found[split] != count:
            also = " with validation" if split == "train" else ""
            yield f"{split}{also}: {found[split]:,} complete samples, published are {count:,}"


def _shown(modality: str, track: Track) -> str:
    seconds = f" in {track.frames / track.rate:.2f} s" if track.rate else ""
    return f"{track.frames} {modality}{seconds}"


def _results(clips: list[Clip], rule: Rule, full: bool, workers: int) -> Iterator[Found]:
    look = partial(_look, rule=rule, full=full)
    if not workers:
        yield from map(look, clips)
        return
    # Ctrl-C reaches every process of a terminal; this one alone answers it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore)
    try:
        yield from pool.map(look, clips, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _look(clip: Clip, rule: Rule, full: bool) -> Found:
    found = Found({}, [], [])
    for modality, source in clip.sources.items():
        try:
            found.tracks[modality] = clip.track(modality, rule)
            source.verify(full)
            if isinstance(source, NumberedPicturesSource) and source.has_gap():
                found.gaps.append(source.folder)
        except DamagedFile as error:
            found.damage.append(str(error))
    return found
