from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmixer_kernels.data.watch import SignalExtractor
from mmixer_kernels.training import extractors, gradient_checkpointing


class Block(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def small() -> nn.Module:
    """Two blocks with what a second computation could do otherwise, and a line of its own between
    them."""
    block = Block(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4))
    line = nn.Sequential(copy.deepcopy(block), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    cumulative = Block(nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(4, 8), block, line, cumulative)


def test_blocks_are_the_innermost_ones_that_stand_in_a_line() -> None:
    network = small()
    blocks = list(gradient_checkpointing._blocks(network))
    assert blocks == [network[1], network[2][0], network[2][1], network[3]]
    resnet = extractors.build("resnet18")
    names = {type(block).__name__ for block in gradient_checkpointing._blocks(resnet)}
    assert names == {"BasicBlock"}
    assert list(gradient_checkpointing._blocks(SignalExtractor(3, 8, 2))) == []


def passed(network: nn.Module, x: Tensor) -> tuple[dict[str, Any], int]:
    """All that a step of a training leaves, and the bytes that forward kept for backward."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    return stepped(network, x, hooks), sum(kept.values())


def stepped(network: nn.Module, x: Tensor, forward: AbstractContextManager[Any]) -> dict[str, Any]:
    """All that a step of a training leaves; its forward runs in a context."""
    torch.manual_seed(0)
    with forward:
        output = network(x)
    weights = torch.linspace(0, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    gradients = {f"{name}.grad": weight.grad for name, weight in network.named_parameters()}
    return {**gradients, **network.state_dict(), "output": output, "draw": torch.rand(1)}


def resnet() -> nn.Module:
    return extractors.build("resnet18")


def r3d() -> nn.Module:
    return extractors.build("r3d_18")


def swin3d() -> nn.Module:
    return extractors.build("swin3d_t")


@pytest.mark.parametrize(
    ("build", "shape", "share"),
    [
        (small, (6, 4), 0.6),
        (lambda: SignalExtractor(3, 8, 2), (4, 32, 3), 0.5),
        (resnet, (2, 3, 3, 32, 32), 0.1),
        pytest.param(r3d, (2, 4, 3, 16, 16), 0.1, marks=pytest.mark.slow),
        pytest.param(swin3d, (1, 4, 3, 32, 32), 0.1, marks=pytest.mark.slow),
    ],
)
def test_a_step_has_the_same_bits_and_keeps_less(
    build: Callable[[], nn.Module], shape: tuple[int, ...], share: float
) -> None:
    torch.manual_seed(1)
    plain = build().train()
    formed = copy.deepcopy(plain)
    gradient_checkpointing.install(formed)
    assert list(formed.state_dict()) == list(plain.state_dict())
    x = torch.randn(shape)
    for _ in range(2):  # the second step begins with the first one's statistics
        (theirs, all_bytes), (ours, bytes_left) = passed(plain, x), passed(formed, x)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
        assert bytes_left < share * all_bytes


def test_a_copy_is_of_itself() -> None:
    """torch.export's check copies the network to float64."""
    network = small()
    gradient_checkpointing.install(network)
    copied = copy.deepcopy(network).double()
    x = torch.randn(6, 4)
    copied(x.double()).sum().backward()
    assert all(weight.grad is None for weight in network.parameters())
    assert all(weight.grad is not None for weight in copied.parameters())


@pytest.mark.slow
def test_a_compiled_network_has_the_same_gradients_and_statistics() -> None:
    torch.manual_seed(1)
    block = Block(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    plain = nn.Sequential(nn.Linear(4, 8), block, copy.deepcopy(block))
    formed = copy.deepcopy(plain)
    gradient_checkpointing.install(formed)
    formed.compile(backend="aot_eager")
    x = torch.randn(6, 4)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        # Without hooks, which torch.compile would trace with the network.
        ours, theirs = stepped(formed, x, nullcontext()), stepped(plain, x, nullcontext())
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
