"""The frames of a sample's modalities that belong to the same moments.

The first modality is the reference: the sampling chooses among its frames, and of every other
modality the frame of the same moment is taken. A rule says when a frame was taken:

- `frame`: frames of equal numbers belong together, as a recorder that fires all sensors at once
  leaves them; what the shortest modality lacks is not read.
- `span`: all modalities of a sample begin and end together. Frame k of n stands at (k + 1/2) / n of
  the clip, whatever the rates.
- `rate`: all modalities begin together, and frame k stands at k / rate. The time that all of them
  have is read, which ends with the modality that is over first.

Of two frames that are equally near, the later one is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

Rule = Literal["frame", "span", "rate"]
Sampling = Callable[[int], Sequence[int]]
"""The indices of the frames, ascending, that are read of so many."""


class Track(NamedTuple):
    """A modality's number of frames in a sample and, for the rule `rate`, frames per second."""

    frames: int
    rate: float | None = None


def align(tracks: Mapping[str, Track], rule: Rule, sampling: Sampling) -> dict[str, list[int]]:
    """The indices of the frames to read of each modality, as many for each and ascending.

    Args:
        tracks: the modalities, the reference first.

    Raises:
        ValueError: the rule is `rate`, and a modality has none.
    """
    reference = next(iter(tracks.values()))
    if rule == "frame":
        chosen = sampling(min(track.frames for track in tracks.values()))
        return {name: list(chosen) for name in tracks}
    if rule == "span":
        chosen = sampling(reference.frames)
        return {
            name: [(2 * k + 1) * track.frames // (2 * reference.frames) for k in chosen]
            for name, track in tracks.items()
        }
    rates = {name: _rate(name, track) for name, track in tracks.items()}
    own = next(iter(rates.values()))
    common = min(track.frames / rates[name] for name, track in tracks.items())
    chosen = sampling(math.ceil(common * own))
    indices = {}
    for name, track in tracks.items():
        nearest = (math.floor(k * rates[name] / own + Fraction(1, 2)) for k in chosen)
        indices[name] = [min(index, track.frames - 1) for index in nearest]
    return indices


def needed(tracks: Mapping[str, Track], rule: Rule, sampling: Sampling) -> dict[str, list[int]]:
    """The indices of the frames that any choice and order of the modalities may read.

    A modality's indices depend on its own track, on the reference's and on the one that is over
    first: three modalities at a time are all the cases.
    """
    found: dict[str, set[int]] = {name: set() for name in tracks}
    for size in (1, 2, 3):
        for chosen in itertools.permutations(tracks, size):
            aligned = align({name: tracks[name] for name in chosen}, rule, sampling)
            for name, indices in aligned.items():
                found[name].update(indices)
    return {name: sorted(indices) for name, indices in found.items()}


def _rate(name: str, track: Track) -> Fraction:
    if track.rate is None:
        raise ValueError(f"{name} has no frame rate, which aligning by rate needs")
    return Fraction(track.rate)
