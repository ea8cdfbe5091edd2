"""Every stream knows exactly what the documentation says, and no more."""

import dataclasses
import itertools
from collections import Counter, defaultdict

import pytest
import torch

from mmixer_kernels import MMixer
from mmixer_kernels.data import SyntheticOptions, collate
from mmixer_kernels.data.synthetic import FrameExtractor

TASKS = ("combine", "compare")
MODALITIES = (("rgb", "depth"), ("depth", "ir", "rgb"))


def options(task="combine", modalities=("rgb", "depth"), **others):
    small = {"frame_size": 12, "frames": 4, "samples": 64, "evaluation_samples": 64}
    return SyntheticOptions(task=task, modalities=modalities, **{**small, **others})


def scenes(split):
    """The samples of each scene, with the attributes that they show."""
    result = defaultdict(list)
    for index in range(len(split)):
        _, attributes = split.gesture_and_attributes(index)
        result[index // len(split.combinations)].append((attributes, split[index]))
    return result.values()


def cells(chosen):
    """All (gesture, attributes) with their labels."""
    attributes = itertools.product((0, 1), repeat=len(chosen.modalities))
    return {(g, a): chosen.label(g, a) for a in attributes for g in range(4)}


@pytest.mark.parametrize("modalities", MODALITIES)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_stream_is_blind_to_the_other_attributes(modalities, split):
    data = options(modalities=modalities).load(None, seed=3)
    for scene in scenes(getattr(data, split)):
        assert len(scene) == 2 ** len(modalities)
        for number in range(len(modalities)):
            clips = {0: [], 1: []}
            for attributes, sample in scene:
                clips[attributes[number]].append(sample.inputs[number])
            for same in clips.values():
                assert len(same) == 2 ** (len(modalities) - 1)
                assert all(torch.equal(clip, same[0]) for clip in same)
            assert not torch.equal(clips[0][0], clips[1][0])


@pytest.mark.parametrize("modalities", MODALITIES)
def test_an_attribute_shows_on_the_body_alone_and_the_body_is_the_same_in_all_streams(modalities):
    data = options(modalities=modalities).load(None, seed=0)
    for scene in scenes(data.test):
        first, last = scene[0][1], scene[-1][1]
        bodies = [
            (a - b).abs().amax(1) > 1e-6 for a, b in zip(first.inputs, last.inputs, strict=True)
        ]
        assert all(torch.equal(body, bodies[0]) for body in bodies)
        assert 0 < bodies[0].float().mean() < 0.3


@pytest.mark.parametrize(("first", "second"), [("rgb", "depth"), ("rgb", "ir"), ("depth", "ir")])
def test_a_stream_does_not_depend_on_which_others_are_filmed(first, second):
    pair = options(modalities=(first, second)).load(None, 0).test[0]
    swapped = options(modalities=(second, first)).load(None, 0).test[0]
    assert torch.equal(pair.inputs[0], swapped.inputs[1])
    assert torch.equal(pair.inputs[1], swapped.inputs[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_labels_are_balanced_and_attributes_independent(task, modalities):
    data = options(task, modalities).load(None, 0)
    for split in (data.train, data.validation, data.test):
        shown = Counter(split.gesture_and_attributes(i) for i in range(len(split)))
        assert len(shown) == 4 * 2 ** len(modalities)
        assert len(set(shown.values())) == 1
        counts = split.labels.bincount(minlength=len(data.classes))
        assert (counts == len(split) / len(data.classes)).all()
        assert [split[i].label for i in range(len(split))] == split.labels.tolist()


@pytest.mark.parametrize(
    ("task", "modalities", "streams", "ceiling"),
    [
        ("combine", MODALITIES[0], 1, 1 / 2),
        ("combine", MODALITIES[1], 1, 1 / 4),
        ("combine", MODALITIES[1], 2, 1 / 2),
        ("compare", MODALITIES[0], 1, 1 / 2),
        ("compare", MODALITIES[1], 1, 1 / 4),
        ("compare", MODALITIES[1], 2, 1 / 2),
        ("combine", MODALITIES[0], 2, 1),
        ("compare", MODALITIES[1], 3, 1),
    ],
)
def test_the_best_that_some_streams_can_reach(task, modalities, streams, ceiling):
    table = cells(options(task, modalities))
    for seen in itertools.combinations(range(len(modalities)), streams):
        labels = defaultdict(Counter)
        for (gesture, attributes), label in table.items():
            labels[gesture, tuple(attributes[i] for i in seen)][label] += 1
        best = sum(counts.most_common(1)[0][1] for counts in labels.values())
        assert best / len(table) == ceiling


@pytest.mark.parametrize("modalities", MODALITIES)
def test_each_compared_label_has_two_opposite_clips(modalities):
    """The bound on added scores, (2^(N-1) + 1) / 2^N, follows from this."""
    attributes = defaultdict(list)
    for (gesture, shown), label in cells(options("compare", modalities)).items():
        attributes[label].append((gesture, shown))
    assert len(attributes) == 4 * 2 ** (len(modalities) - 1)
    for (gesture, first), (same_gesture, second) in attributes.values():
        assert gesture == same_gesture
        assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("modalities", "bound"), [(MODALITIES[0], 3 / 4), (MODALITIES[1], 5 / 8)])
def test_fitted_sums_of_scores_reach_the_bound_and_stay_under_it(modalities, bound):
    table = {a: label for (g, a), label in cells(options("compare", modalities)).items() if g == 0}
    seen = torch.tensor([[*a, *(1 - x for x in a)] for a in table], dtype=torch.float64)
    labels = torch.tensor(list(table.values())).expand(500, -1)
    weight = torch.randn(500, seen.shape[1], len(table) // 2, dtype=torch.float64)
    emphasis = torch.rand(labels.shape, dtype=torch.float64) ** 3
    optimizer = torch.optim.Adam([weight.requires_grad_()], lr=0.1)
    for _ in range(50):
        losses = torch.nn.functional.cross_entropy(
            (seen @ weight).flatten(0, 1), labels.flatten(), reduction="none"
        )
        optimizer.zero_grad()
        (losses * emphasis.flatten()).sum().backward()
        optimizer.step()
    right = ((seen @ weight).argmax(2) == labels).double().mean(1)
    assert right.max() == bound


@pytest.mark.parametrize(
    ("unit", "content", "adds"),
    [
        ("gru", "cross", True),
        ("lstm", "cross", True),
        ("mcu", "self", True),
        ("mcu", "cross", False),
    ],
)
def test_which_networks_only_add_scores(unit, content, adds):
    data = options("compare").load(None, 0)
    network = MMixer(data.feature_sizes, 8, hidden_size=8, unit=unit, content=content)
    inputs = collate([data.test[i] for i in range(len(data.test))]).inputs
    with torch.no_grad():
        features = [extract(x) for extract, x in zip(data.extractors, inputs, strict=True)]
        scores = network(features).double().unflatten(0, (-1, 2, 2))
    interaction = scores[:, 0, 0] + scores[:, 1, 1] - scores[:, 0, 1] - scores[:, 1, 0]
    assert (interaction.abs().max() < 1e-5) == adds


@pytest.mark.parametrize("frames", [2, 5])
def test_the_body_takes_its_path(frames):
    data = options(frames=frames, frame_size=24, noise=0.0).load(None, 1)
    directions = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
    for number, scene in enumerate(scenes(data.test)):
        gesture, _ = data.test.gesture_and_attributes(4 * number)
        body = (scene[0][1].inputs[1] - scene[-1][1].inputs[1]).abs()[:, 0]
        body = body / body.sum((1, 2), keepdim=True)
        pixel = (torch.arange(24) + 0.5) / 24
        centre = torch.stack([(body.sum(1) * pixel).sum(1), (body.sum(2) * pixel).sum(1)], 1)
        travel = centre[-1] - centre[0]
        along = travel @ torch.tensor(directions[gesture])
        assert 0.35 < along < 0.65
        assert travel.abs().sum() - along < 0.01


def test_the_whole_body_is_in_the_frame():
    data = options(frame_size=32, noise=0.0).load(None, 2)
    for scene in scenes(data.test):
        body = (scene[0][1].inputs[1] - scene[-1][1].inputs[1]).abs()
        area = body.sum((1, 2, 3))
        assert area.max() < 1.25 * area.min()


def test_shapes_and_types():
    data = options(modalities=MODALITIES[1], frame_size=9, frames=3).load(None, 0)
    sample = data.train[5]
    assert [list(x.shape) for x in sample.inputs] == [[3, 1, 9, 9], [3, 1, 9, 9], [3, 3, 9, 9]]
    assert all(x.dtype == torch.float32 for x in sample.inputs)
    assert sample.length == 3
    inputs = collate([sample, data.train[6]]).inputs
    for extract, x, size in zip(data.extractors, inputs, data.feature_sizes, strict=True):
        assert extract(x).shape == (2, 3, size)


def test_frames_have_features_of_their_own():
    extract = FrameExtractor(3, 8, 5)
    frames = torch.randn(2, 4, 3, 8, 8)
    features = extract(frames)
    torch.testing.assert_close(extract(frames[1:, 2:3]), features[1:, 2:3])


def test_noise_is_as_wide_as_asked():
    calm = options(noise=0.0).load(None, 0).test[0].inputs[0]
    noisy = options(noise=0.3).load(None, 0).test[0].inputs[0]
    assert 0.27 < (noisy - calm).std() < 0.33


def test_clips_repeat_by_seed_epoch_and_index():
    first, again = (options().load(None, 5) for _ in range(2))
    other = options().load(None, 6)
    for name in ("train", "validation", "test"):
        clip = getattr(first, name)[3].inputs[0]
        assert torch.equal(clip, getattr(again, name)[3].inputs[0])
        assert not torch.equal(clip, getattr(other, name)[3].inputs[0])
    splits = [split[3].inputs[0] for split in (first.train, first.validation, first.test)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(splits, 2))


def test_each_epoch_has_new_training_clips_and_no_other():
    data = options().load(None, 5)
    for split, changes in ((data.train, True), (data.validation, False), (data.test, False)):
        before, labels = split[3], split.labels.clone()
        split.set_epoch(7)
        assert torch.equal(before.inputs[0], split[3].inputs[0]) != changes
        assert before.label == split[3].label
        split.set_epoch(0)
        assert torch.equal(before.inputs[0], split[3].inputs[0])
        assert torch.equal(labels, split.labels)


def test_classes_are_named():
    data = options().load(None, 0)
    assert len(data.classes) == 16
    assert data.classes[0] == "left-right red front"
    assert data.classes[5] == "right-left red behind"
    assert len(options(modalities=MODALITIES[1]).load(None, 0).classes) == 32
    compare = options("compare").load(None, 0)
    assert compare.classes[:3] == ("left-right agree", "left-right differ", "right-left agree")
    assert len(compare.classes) == 8
    three = options("compare", MODALITIES[1]).load(None, 0)
    assert three.classes[:2] == ("left-right agree agree", "left-right agree differ")
    assert len(three.classes) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "both"}, "task must be combine or compare, but is 'both'"),
        ({"modalities": ("rgb",)}, "modalities must be two or three of rgb, depth, ir"),
        ({"modalities": ("rgb", "rgb")}, "each once, but are 'rgb rgb'"),
        ({"modalities": ("rgb", "skeleton")}, "but are 'rgb skeleton'"),
        ({"frame_size": 7}, "frame_size must be 8 or more, but is 7"),
        ({"frames": 1}, "frames must be 2 or more, but is 1"),
        ({"speed": 0.0}, r"speed must be above 0 and at most 0.5, but is 0.0"),
        ({"speed": 0.6}, r"speed must be above 0 and at most 0.5, but is 0.6"),
        ({"noise": -0.1}, r"noise must be 0 or more and finite, but is -0.1"),
        ({"noise": float("nan")}, "noise must be 0 or more and finite, but is nan"),
        ({"samples": 24}, "samples must be a positive multiple of 16, .* but is 24"),
        ({"evaluation_samples": 0}, "evaluation_samples must be a positive multiple of 16"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options(), **change).load(None, 0)


def test_a_root_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root must be left out for synthetic clips"):
        options().load(tmp_path, 0)
