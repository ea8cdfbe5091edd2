from __future__ import annotations

import pytest

from mmixer_kernels.training import parsing

PAPER = {
    "ntu60-rgb-depth": ("ntu60", ("rgb", "depth"), "resnet18"),
    "ntu60-rgb-depth-ir": ("ntu60", ("rgb", "depth", "ir"), "resnet18"),
    "ntu120-rgb-depth": ("ntu120", ("rgb", "depth"), "resnet34"),
    "nw-ucla-rgb-depth": ("nw-ucla", ("rgb", "depth"), "resnet18"),
}


def test_the_package_has_a_recipe_for_each_of_the_papers_results() -> None:
    assert set(parsing.recipes()) == set(PAPER)


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
