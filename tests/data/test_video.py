from __future__ import annotations

import pytest

from mmixer_kernels.data import DATA
from mmixer_kernels.data.video import first
from mmixer_kernels.training import parsing

VIDEO = {"ntu60": (60, 5000), "ntu120": (120, 5000), "nw-ucla": (10, 3975)}


@pytest.mark.parametrize("name", [*VIDEO, "clips"])
def test_defaults_are_the_papers(name):
    chosen = parsing.parse(["--data", name], "train")
    run, data = chosen.run, chosen.data
    assert (run.optimizer.name, run.optimizer.learning_rate) == ("adam", 1e-4)
    assert run.optimizer.schedule == "constant"
    assert (run.loader.batch_size, run.model.hidden_size) == (8, 512)
    assert (data.modalities, data.stride, data.frames) == (("rgb", "depth"), 8, None)
    assert data.image_size == 224
    assert data.name == name


@pytest.mark.parametrize(("name", "numbers"), VIDEO.items())
def test_the_colour_map_spreads_over_frames_or_to_the_sensors_maximum(name, numbers):
    classes, maximum = numbers
    assert len(DATA[name].classes) == len(set(DATA[name].classes)) == classes
    assert DATA[name]()._transform().maximum == {}
    assert DATA[name](color_range="fixed")._transform().maximum["depth"] == maximum


def test_options_reach_sampling_and_transform():
    arguments = ["--data", "ntu60", "--modalities", "ir", "rgb", "depth", "--image-size", "64"]
    data = parsing.parse([*arguments, "--flip", "0.25", "--jitter", "0"], "train").data
    assert data.modalities == ("ir", "rgb", "depth")
    transform = data._transform()
    assert (transform.image_size, transform.flip, transform.jitter) == (64, 0.25, 0.0)


def test_only_the_first_names_are_listed():
    assert first(["a", "b"], most=2) == "a, b"
    assert first("abcde", most=2) == "a, b, and 3 more"
