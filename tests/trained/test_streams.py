"""Eq. 15's classifiers on frozen networks, on clips whose ceilings are known exactly."""

import math
from dataclasses import replace

import pytest
import torch

from mmixer_kernels.data import DATA, Split
from mmixer_kernels.errors import UserError
from mmixer_kernels.evaluate import main as evaluate
from mmixer_kernels.network import MMixer
from mmixer_kernels.train import main as train
from mmixer_kernels.trained.streams import (
    WEIGHT_DECAY,
    evaluate_streams,
    heads_path,
    load_heads,
    save_heads,
    train_heads,
)
from mmixer_kernels.training.model import Recognizer
from mmixer_kernels.training.options import LoaderOptions


def recognizer(data):
    return Recognizer(data.extractors, MMixer(data.feature_sizes, len(data.classes), hidden_size=8))


def test_network_is_left_as_it_was():
    options = DATA["synthetic"](frame_size=8, frames=2, samples=32, evaluation_samples=16)
    data = options.load(None, 0)
    model = recognizer(data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = train_heads(model, data, LoaderOptions(batch_size=5))
    evaluations = evaluate_streams(model, heads, data.test, LoaderOptions(batch_size=5))
    assert [int(part.confusion.sum()) for part in evaluations] == [16, 16]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heads_learn_from_plain_samples_and_repeat_to_the_bit():
    options = DATA["synthetic"](frame_size=8, frames=2, samples=32, evaluation_samples=16)
    data = options.load(None, 0)
    model, loader = recognizer(data), LoaderOptions(batch_size=5)
    plain = train_heads(model, data, loader)

    class Augmented(Split):
        def __getitem__(self, index):
            raise AssertionError("an augmented sample was drawn")

        def plain(self):
            return data.train

    torch.manual_seed(7)
    again = train_heads(model, replace(data, train=Augmented(data.train.labels)), loader)
    for ours, theirs in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_stay_bounded_where_samples_are_separable():
    """The loss is 2 log K at zero weights: the minimum's penalty is no larger."""
    options = DATA["synthetic"](frame_size=8, frames=2, samples=32, evaluation_samples=16)
    data = options.load(None, 0)
    torch.manual_seed(0)
    mixer = MMixer(data.feature_sizes, len(data.classes), hidden_size=64)
    model = Recognizer(data.extractors, mixer)
    heads = train_heads(model, data, LoaderOptions(batch_size=8))
    squares = sum(weight.square().sum().item() for weight in heads.parameters())
    assert WEIGHT_DECAY / 2 * squares < 2 * math.log(len(data.classes))
    trained = evaluate_streams(model, heads, data.train.plain(), LoaderOptions(batch_size=8))
    assert all(part.confusion.diagonal().sum() == 32 for part in trained)


@pytest.mark.parametrize("content", ["cross", "self"])
def test_cross_content_carries_the_other_stream(content, tmp_path, capsys):
    """RGB alone cannot pass 50 % in `combine`; what depth saw arrives through g, and only so."""
    arguments = ["--output", str(tmp_path / "run"), "--model.content", content, "--epochs", "3"]
    assert train([*arguments, "--samples", "2048", "--evaluation-samples", "256"]) == 0
    assert evaluate([str(tmp_path / "run" / "best.pt"), "--streams"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "stream alone" in line]
    accuracies = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert len(accuracies) == 2
    if content == "cross":
        assert min(accuracies) > 60
    else:
        assert max(accuracies) <= 50


def test_classifiers_are_kept_with_the_weights_they_belong_to(tmp_path):
    options = DATA["synthetic"](frame_size=8, frames=2, samples=32, evaluation_samples=16)
    data = options.load(None, 0)
    model = recognizer(data)
    path = tmp_path / "best.pt"
    assert load_heads(model, path) is None
    heads = train_heads(model, data, LoaderOptions(batch_size=8))
    save_heads(heads, model, path)
    assert heads_path(path).name == "best.streams.pt"
    streams = [torch.randn(3, 8), torch.randn(3, 8)]
    for ours, theirs in zip(load_heads(model, path)(streams), heads(streams), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        model.mixer.classifier.bias[0] += 1
    with pytest.raises(UserError, match=r"best\.streams\.pt belongs to other weights than"):
        load_heads(model, path)
