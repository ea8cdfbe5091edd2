from __future__ import annotations

import pytest

from mmixer_kernels.training import parsing

PAPER = {
    "ntu60-rgb-depth": ("ntu60", ("rgb", "depth"), "resnet18"),
    "ntu60-rgb-depth-ir": ("ntu60", ("rgb", "depth", "ir"), "resnet18"),
    "ntu120-rgb-depth": ("ntu120", ("rgb", "depth"), "resnet34"),
    "nw-ucla-rgb-depth": ("nw-ucla", ("rgb", "depth"), "resnet18"),
}
OURS = {"ntu60-rgb-depth-video": "ntu60", "ntu120-rgb-depth-video": "ntu120"}


def test_the_package_has_a_recipe_for_each_of_the_papers_results_and_our_own() -> None:
    assert set(parsing.recipes()) == {*PAPER, *OURS}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_are_the_papers(name: str) -> None:
    chosen = parsing.parse(["--config", name], "train")
    data, modalities, extractor = PAPER[name]
    assert chosen.run.data == data
    assert tuple(chosen.data.modalities) == modalities
    assert (chosen.run.model.extractor, chosen.run.model.weights) == (extractor, "imagenet")
    assert chosen.run.model.hidden_size == 512
    assert (chosen.run.optimizer.name, chosen.run.optimizer.learning_rate) == ("adam", 1e-4)
    assert chosen.run.optimizer.schedule == "constant"
    assert chosen.run.loader.batch_size == 8


@pytest.mark.parametrize("name", OURS)
def test_recipes_of_ours_say_so_and_their_networks_take_their_clips(name: str) -> None:
    pytest.importorskip("torchvision")
    from mmixer_kernels.training import extractors

    path = parsing.recipes()[name]
    assert path.read_text().startswith("# Ours, not the paper's, and not run on the data")
    chosen = parsing.parse(["--config", name], "train")
    assert chosen.run.data == OURS[name]
    network = extractors.build(chosen.run.model.extractor)
    assert network.joins_steps
    size = chosen.data.image_size  # type: ignore[attr-defined]
    extractors.check(network, (chosen.data.frames, 3, size, size))  # type: ignore[attr-defined]
    rates = chosen.run.optimizer
    assert rates.extractor_rate == pytest.approx(rates.learning_rate / 10)


def test_the_video_recipes_differ_in_the_data_alone() -> None:
    first, second = (parsing.parse(["--config", name], "train").config() for name in OURS)
    assert {key for key in first if first[key] != second[key]} == {"data"}
