"""The frames of the modalities that belong together, by each rule."""

from __future__ import annotations

import itertools

import pytest

from mmixer_kernels.data.alignment import Rule, Track, align, needed
from mmixer_kernels.data.transforms import Sampling


def every(count: int) -> list[int]:
    return list(range(count))


def test_frames_of_equal_numbers_are_those_of_the_shortest() -> None:
    tracks = {"rgb": Track(20), "depth": Track(17), "ir": Track(33)}
    assert align(tracks, "frame", Sampling(8)) == {name: [0, 8, 16] for name in tracks}


def test_a_span_has_all_modalities_begin_and_end_together() -> None:
    tracks = {"rgb": Track(8), "depth": Track(4), "ir": Track(16), "flow": Track(7)}
    assert align(tracks, "span", every) == {
        "rgb": [0, 1, 2, 3, 4, 5, 6, 7],
        "depth": [0, 0, 1, 1, 2, 2, 3, 3],
        "ir": [1, 3, 5, 7, 9, 11, 13, 15],  # of two that are equally near, the later
        "flow": [0, 1, 2, 3, 3, 4, 5, 6],
    }
    assert align({"depth": Track(4), "rgb": Track(8)}, "span", every) == {
        "depth": [0, 1, 2, 3],
        "rgb": [1, 3, 5, 7],
    }


@pytest.mark.parametrize("rule", ["frame", "span", "rate"])
def test_equal_tracks_have_equal_frames(rule: Rule) -> None:
    for frames in (1, 2, 9, 100):
        tracks = {name: Track(frames, 29.97) for name in "abc"}
        assert align(tracks, rule, Sampling(3)) == {name: Sampling(3)(frames) for name in "abc"}


@pytest.mark.parametrize("order", [*itertools.permutations(("rgb", "depth", "ir"))])
def test_a_span_takes_the_frame_whose_middle_is_nearest(order: tuple[str, ...]) -> None:
    frames = {"rgb": 31, "depth": 17, "ir": 7}
    aligned = align({name: Track(frames[name]) for name in order}, "span", Sampling(2))
    for name in order:
        for k, index in zip(aligned[order[0]], aligned[name], strict=True):
            moment = (k + 0.5) / frames[order[0]]
            distances = [abs((j + 0.5) / frames[name] - moment) for j in range(frames[name])]
            assert distances[index] == pytest.approx(min(distances))


def test_rates_tell_the_moments_and_the_shortest_tells_the_end() -> None:
    tracks = {"rgb": Track(30, 30.0), "depth": Track(12, 15.0)}  # 1 s and 0.8 s
    assert align(tracks, "rate", Sampling(6)) == {"rgb": [0, 6, 12, 18], "depth": [0, 3, 6, 9]}
    assert align(dict(reversed(tracks.items())), "rate", Sampling(3)) == {
        "depth": [0, 3, 6, 9],
        "rgb": [0, 6, 12, 18],
    }
    assert align(tracks, "rate", every)["depth"] == [  # a half is nearer to the later
        *(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 11)
    ]
    uneven = {"rgb": Track(100, 29.97), "depth": Track(70, 20.0)}
    aligned = align(uneven, "rate", every)
    assert len(aligned["rgb"]) == 100
    for k, index in zip(aligned["rgb"], aligned["depth"], strict=True):
        assert abs(index / 20 - k / 29.97) <= 0.5 / 20 + 1e-9


def test_without_a_rate_there_is_no_rule_of_rates() -> None:
    with pytest.raises(ValueError, match="depth has no frame rate"):
        align({"rgb": Track(3, 30.0), "depth": Track(3)}, "rate", every)


@pytest.mark.parametrize("rule", ["frame", "span", "rate"])
@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(3), Sampling(frames=4)])
def test_needed_is_what_any_choice_and_order_reads_and_no_more(
    rule: Rule, sampling: Sampling
) -> None:
    tracks = {
        "rgb": Track(40, 30.0),
        "depth": Track(17, 12.5),
        "ir": Track(33, 29.97),
        "flow": Track(10, 6.0),
    }
    read: dict[str, set[int]] = {name: set() for name in tracks}
    for number in range(1, 5):
        for chosen in itertools.permutations(tracks, number):
            indices = align({name: tracks[name] for name in chosen}, rule, sampling)
            for name, own in indices.items():
                assert own == sorted(own)
                assert all(0 <= index < tracks[name].frames for index in own)
                read[name].update(own)
    assert needed(tracks, rule, sampling) == {name: sorted(own) for name, own in read.items()}
