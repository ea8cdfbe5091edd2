"""Eq. 15's classifiers on frozen networks, on clips whose ceilings are known exactly."""

import pytest
import torch

from mmixer_kernels.data import DATA
from mmixer_kernels.evaluate import main as evaluate
from mmixer_kernels.network import MMixer
from mmixer_kernels.train import main as train
from mmixer_kernels.training.model import Recognizer
from mmixer_kernels.training.options import LoaderOptions
from mmixer_kernels.training.streams import evaluate_streams


def test_network_is_left_as_it_was():
    options = DATA["synthetic"](frame_size=8, frames=2, samples=32, evaluation_samples=16)
    data = options.load(None, 0)
    model = Recognizer(
        data.extractors, MMixer(data.feature_sizes, len(data.classes), hidden_size=8)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluations = evaluate_streams(model, data, data.test, LoaderOptions(batch_size=5))
    assert [int(part.confusion.sum()) for part in evaluations] == [16, 16]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("content", ["cross", "self"])
def test_cross_content_carries_the_other_stream(content, tmp_path, capsys):
    """In `combine` RGB alone cannot pass 50 %; what depth saw arrives through g, and only so."""
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
