"""A model that was written for `nn.GRU` becomes ours by its constructors alone."""

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmixer_kernels import FusedMCUStack

WORDS, PADDING, START = 12, 0, 1


class Encoder(nn.Module):
    def __init__(self, recurrent, hidden):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden, padding_idx=PADDING)
        self.gru = recurrent(
            hidden, hidden, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True
        )
        self.bridge = nn.Linear(2 * hidden, hidden)

    def forward(self, words, lengths=None):
        self.gru.flatten_parameters()
        embedded = self.embedding(words)
        if lengths is None:
            output, hidden = self.gru(embedded)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            packed, hidden = self.gru(packed)
            output, _ = pad_packed_sequence(packed, batch_first=True)
        directions = 2 if self.gru.bidirectional else 1
        hidden = hidden.view(self.gru.num_layers, directions, *hidden.shape[1:])
        hidden = torch.tanh(self.bridge(torch.cat([hidden[:, 0], hidden[:, 1]], dim=-1)))
        return output, hidden


class Decoder(nn.Module):
    """One word after another, each with attention to the encoder's outputs."""

    def __init__(self, recurrent, hidden):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.query = nn.Linear(hidden, 2 * hidden)
        self.gru = recurrent(3 * hidden, hidden, num_layers=2, dropout=0.1, batch_first=True)
        self.words = nn.Linear(hidden, WORDS)

    def forward(self, word, hidden, memory):
        scores = torch.bmm(memory, self.query(hidden[-1])[:, :, None])
        attended = (F.softmax(scores, dim=1) * memory).sum(1)
        step = torch.cat([self.embedding(word), attended], dim=-1)[:, None]
        output, hidden = self.gru(step, hidden)
        return self.words(output.squeeze(1)), hidden


class Translator(nn.Module):
    def __init__(self, recurrent, hidden=24):
        super().__init__()
        self.encoder, self.decoder = Encoder(recurrent, hidden), Decoder(recurrent, hidden)

    def forward(self, words, targets, lengths=None):
        memory, hidden = self.encoder(words, lengths)
        logits, word = [], torch.full_like(targets[:, 0], START)
        for t in range(targets.shape[1]):
            step, hidden = self.decoder(word, hidden, memory)
            logits.append(step)
            word = targets[:, t]
        return torch.stack(logits, dim=1)


def of_ours(input_size, hidden_size, **options):
    return FusedMCUStack(input_size, 0, hidden_size, **options)


def sentences(count):
    """Words, their number, and the words backwards, padded."""
    lengths = torch.randint(2, 6, (count,))
    lengths[0] = 5
    words = torch.full((count, 5), PADDING)
    backwards = words.clone()
    for i, length in enumerate(lengths.tolist()):
        words[i, :length] = torch.randint(2, WORDS, (length,))
        backwards[i, :length] = words[i, :length].flip(0)
    return words, lengths, backwards


@pytest.mark.parametrize("recurrent", [nn.GRU, of_ours])
def test_it_trains(recurrent):
    torch.manual_seed(0)
    model = Translator(recurrent)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        words, lengths, backwards = sentences(32)
        logits = model(words, backwards, lengths)
        loss = F.cross_entropy(logits.flatten(0, 1), backwards.flatten(), ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_is_exported():
    model = Translator(of_ours).eval()
    words, _, backwards = sentences(4)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (words, backwards), dynamic_shapes=({0: batch}, {0: batch})
    )
    words, _, backwards = sentences(7)
    torch.testing.assert_close(program.module()(words, backwards), model(words, backwards))


def test_its_shapes_are_a_grus():
    for options in itertools.product((1, 3), (False, True), (False, True)):
        named = dict(zip(("num_layers", "bidirectional", "batch_first"), options, strict=True))
        ours, gru = of_ours(4, 6, **named), nn.GRU(4, 6, **named)
        states = torch.randn(named["num_layers"] * (1 + named["bidirectional"]), 5, 6)
        x = torch.randn(5, 5, 4)
        for result, expected in zip(ours(x, states), gru(x, states), strict=True):
            assert result.shape == expected.shape


def test_each_argument_of_a_gru_has_an_answer():
    """`FusedMCUStack` takes what `nn.GRU` does under the same name, but a bias."""
    taken = inspect.signature(FusedMCUStack).parameters
    of_gru = {
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
        *("bidirectional", "device", "dtype"),
    }
    assert of_gru - set(taken) == {"bias"}
