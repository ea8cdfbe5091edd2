"""M-Mixer and its ablations, against the paper's equations."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmixer_kernels import MMixer, StreamClassifiers, engines
from mmixer_kernels.engines import cpu
from mmixer_kernels.reference import MCU

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def features(sizes=(6, 5), batch=3, steps=7):
    return [torch.randn(batch, steps, size) for size in sizes]


@pytest.mark.parametrize("sizes", [(6, 5), (6, 5, 4), (3, 3, 3, 3)])
@pytest.mark.parametrize("content", ["cross", "self"])
def test_equations_2_to_5(sizes, content):
    mixer = MMixer(sizes, 10, hidden_size=8, content=content)
    x = features(sizes)
    contents = [f.mean(1) for f in x]
    states = []
    for i, unit in enumerate(mixer.units):
        others = [c for j, c in enumerate(contents) if j != i]
        context = torch.cat(others, -1) if content == "cross" else contents[i]
        plain = MCU(sizes[i], context.shape[1], 8, batch_first=True)
        plain.load_state_dict(unit.state_dict())
        states.append(plain(x[i], context)[1][0])
    for stream, state in zip(mixer.streams(x), states, strict=True):
        torch.testing.assert_close(stream, state)
    logits = torch.cat(states, -1) @ mixer.classifier.weight.T + mixer.classifier.bias
    torch.testing.assert_close(mixer(x), logits)


@pytest.mark.parametrize(
    ("unit", "summarizer", "content", "mix", "layer_norm"),
    list(
        itertools.product(
            ["mcu"], ["avg", "max", "gru"], ["cross", "self"], ["gated", "concat"], [True, False]
        )
    ),
)
def test_every_option_trains_and_heeds_lengths(unit, summarizer, content, mix, layer_norm):
    options = {"summarizer": summarizer, "content": content, "mix": mix, "layer_norm": layer_norm}
    _check_training_and_lengths(MMixer((6, 5, 4), 10, hidden_size=8, unit=unit, **options))


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_table_2_units_train_and_heed_lengths(unit):
    mixer = MMixer((6, 5, 4), 10, hidden_size=8, unit=unit)
    _check_training_and_lengths(mixer)
    x = features((6, 5, 4))
    stream = mixer.streams(x)[1]
    _, state = mixer.units[1](x[1])
    torch.testing.assert_close(stream, (state if unit == "gru" else state[0])[0])


def _check_training_and_lengths(mixer):
    x, lengths = features((6, 5, 4)), torch.tensor([7, 2, 4])
    logits = mixer(x, lengths)
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    shorter = [f[1:2, :2] for f in x]
    torch.testing.assert_close(mixer(shorter), logits[1:2])


def test_time_first_is_batch_first():
    first, time = (
        MMixer((6, 5), 10, hidden_size=8),
        MMixer((6, 5), 10, hidden_size=8, batch_first=False),
    )
    time.load_state_dict(first.state_dict())
    x, lengths = features(), torch.tensor([7, 2, 4])
    expected = first(x, lengths)
    assert torch.equal(time([f.transpose(0, 1) for f in x], lengths), expected)


def test_one_call_of_the_engine(monkeypatch):
    """The modalities are weight sets of one call, whatever N."""
    from mmixer_kernels.engines import cpu

    calls = []
    forward = cpu._native.forward
    monkeypatch.setattr(cpu._native, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    MMixer((6, 5, 4), 10, hidden_size=8)(features((6, 5, 4)))
    assert len(calls) == 1


def test_stream_classifiers_leave_the_network_alone():
    """Eq. 15-16: no bias, and no gradient reaches the network."""
    mixer = MMixer((6, 5), 10, hidden_size=8)
    heads = StreamClassifiers(mixer)
    assert [tuple(p.shape) for p in heads.parameters()] == [(10, 8), (10, 8)]
    streams = mixer.streams(features())
    logits = heads(streams)
    torch.testing.assert_close(logits[1], streams[1] @ heads.weights[1].weight.T)
    sum(nn.functional.cross_entropy(x, torch.tensor([1, 2, 3])) for x in logits).backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for p in mixer.parameters())
    with pytest.raises(TypeError, match="network must be an MMixer, but is a Linear"):
        StreamClassifiers(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(feature_sizes=[4], num_classes=2), "two modalities or more, but has 1"),
        (
            dict(feature_sizes=[4, 0], num_classes=2),
            r"feature_sizes\[1\] must be a positive int",
        ),
        (dict(feature_sizes=[4, 4], num_classes=0), "num_classes must be a positive int"),
        (
            dict(feature_sizes=[4, 4], num_classes=2, unit="rnn"),
            "unit must be one of mcu, gru, lstm",
        ),
        (dict(feature_sizes=[4, 4], num_classes=2, summarizer="sum"), "summarizer must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, content="both"), "content must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, mix="both"), "mix must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, engine="fast"), "engine must be one of"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMixer(**arguments)


@pytest.mark.parametrize("unit", ["mcu", "gru"])
def test_wrong_features(unit):
    mixer, x = MMixer((6, 5), 10, hidden_size=8, unit=unit), features()
    with pytest.raises(
        ValueError, match="features must have 2 tensors, one per modality, but has 1"
    ):
        mixer(x[:1])
    with pytest.raises(ValueError, match=r"features\[1\] must be \[B, T, 5\], but has shape"):
        mixer([x[0], x[0]])
    with pytest.raises(ValueError, match="features must agree in B and T"):
        mixer([x[0], x[1][:, :6]])
    with pytest.raises(ValueError, match="at least one sample and one step"):
        mixer([f[:, :0] for f in x])
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.7"):
        mixer(x, torch.tensor([0, 1, 2]))


def test_three_modalities_are_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    if not engines()["cpu"].available:
        pytest.skip(engines()["cpu"].reason)
    calls: list[str] = []
    native = cpu._native

    def counted(name: str) -> Callable[..., object]:
        def call(*arguments: Any) -> object:
            calls.append(name)
            return getattr(native, name)(*arguments)

        return call

    watched = SimpleNamespace(**vars(native))
    watched.forward, watched.backward = counted("forward"), counted("backward")
    monkeypatch.setattr(cpu, "_native", watched)
    features = [torch.randn(2, 4, size, requires_grad=True) for size in (5, 6, 7)]
    network = MMixer([5, 6, 7], num_classes=3, hidden_size=8, engine="cpu")
    network(features).sum().backward()
    assert calls == ["forward", "backward"]
