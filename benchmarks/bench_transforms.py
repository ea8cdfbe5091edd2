"""torch.func on FusedMCU beside what it saves: one call of the batch, one call of all weight sets,
`loss.backward()` and a loop over samples."""

from __future__ import annotations

import problems
import pytest
import torch
from conftest import Compare
from problems import Size
from torch import Tensor, nn

from mmixer_kernels import FusedMCU, functional, reference
from mmixer_kernels.comparison import checking
from mmixer_kernels.comparison.checking import Subject
from mmixer_kernels.comparison.passes import PASSES, contender
from mmixer_kernels.comparison.timing import Contender
from mmixer_kernels.reference import Weights

CALLS = 8
SIZES = [Size(16, 8, 64), Size(64, 8, 256)]
"""The calls' sizes; in the small one the host's work shows."""

Function = torch.func.functional_call


def _unit(size: Size) -> FusedMCU:
    torch.manual_seed(0)
    return FusedMCU(*[size.hidden] * 3, engine="cpu")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_vmap_over_samples(compare: Compare, size: Size, passes: str, threads: int) -> None:
    unit = _unit(size)
    inputs = torch.randn(CALLS, *size, requires_grad=True)
    contexts = torch.randn(CALLS, size.batch, size.hidden, requires_grad=True)
    weights = list(unit.parameters())

    def batch(inputs: Tensor, contexts: Tensor, *_: Tensor) -> Tensor:
        return unit(inputs.transpose(0, 1).flatten(1, 2), contexts.flatten(0, 1))[0]

    def vmap(inputs: Tensor, contexts: Tensor, *_: Tensor) -> Tensor:
        return torch.vmap(lambda x, c: unit(x, c)[0])(inputs, contexts)

    def truth(inputs: Tensor, contexts: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        own = Weights(*weights)
        calls = zip(inputs, contexts, strict=True)
        return (torch.stack([reference.mcu(x, c, own)[0] for x, c in calls]),)

    operands = {"inputs": inputs, "contexts": contexts, **dict(unit.named_parameters())}
    error = checking.check(Subject(lambda *x: (vmap(*x),), truth, operands))
    every = [inputs, contexts, *weights]
    contenders = [
        contender(f"torch.vmap over {CALLS} calls", vmap, every, passes),
        contender("one call of all samples", batch, every, passes),
        contender(
            f"{CALLS} calls",
            lambda *x: [unit(x[0][i], x[1][i])[0] for i in range(CALLS)],
            every,
            passes,
        ),
    ]
    compare(
        f"torch.vmap over samples, {passes}", str(size), contenders, threads=threads, error=error
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_vmap_over_weights(compare: Compare, size: Size, passes: str, threads: int) -> None:
    unit = _unit(size)
    names = list(dict(unit.named_parameters()))
    weights = [torch.stack([x.detach()] * CALLS).requires_grad_() for x in unit.parameters()]
    input, context = problems.sequence_operands(size, torch.device("cpu"))

    def vmap(input: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        def call(weights: dict[str, Tensor]) -> Tensor:
            output: Tensor = Function(unit, weights, (input, context))[0]
            return output

        return torch.vmap(call)(dict(zip(names, weights, strict=True)))

    def group(input: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        sets = [Weights(*(x[i] for x in weights)) for i in range(CALLS)]
        return functional.mcu_group([input] * CALLS, [context] * CALLS, sets, engine="cpu")[0]

    def truth(input: Tensor, context: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        sets = [Weights(*(x[i] for x in weights)) for i in range(CALLS)]
        return (torch.stack([reference.mcu(input, context, own)[0] for own in sets]),)

    operands = {"input": input, "context": context, **dict(zip(names, weights, strict=True))}
    error = checking.check(Subject(lambda *x: (vmap(*x),), truth, operands))
    every = list(operands.values())
    contenders = [
        contender(f"torch.vmap over {CALLS} weight sets", vmap, every, passes),
        contender("functional.mcu_group", group, every, passes),
    ]
    compare(
        f"torch.vmap over weights, {passes}", str(size), contenders, threads=threads, error=error
    )


def _loss(results: tuple[Tensor, Tensor]) -> Tensor:
    return results[0].square().sum()


def _error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    errors = {
        name: float((found[name].double() - x).norm() / x.norm()) for name, x in truth.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < checking.TOLERANCE}
    assert not wrong, f"relative errors must be below {checking.TOLERANCE}, but are {wrong}"
    return max(errors.values())


def _exact(unit: FusedMCU) -> reference.MCU:
    exact = reference.MCU(unit.input_size, unit.context_size, unit.hidden_size).double()
    exact.load_state_dict(unit.state_dict())
    return exact


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient(compare: Compare, size: Size, threads: int) -> None:
    unit, gru = _unit(size), nn.GRU(size.hidden, size.hidden)
    input, context = (x.detach() for x in problems.sequence_operands(size, torch.device("cpu")))

    def func(module: nn.Module, *operands: Tensor) -> dict[str, Tensor]:
        weights = {name: x.detach() for name, x in module.named_parameters()}
        return torch.func.grad(lambda w: _loss(Function(module, w, operands)))(weights)

    def backward(module: nn.Module, *operands: Tensor) -> dict[str, Tensor]:
        weights = dict(module.named_parameters())
        grads = torch.autograd.grad(_loss(module(*operands)), list(weights.values()))
        return dict(zip(weights, grads, strict=True))

    truth = backward(_exact(unit), input.double(), context.double())
    contenders = [
        Contender("torch.func.grad", lambda: func(unit, input, context)),
        Contender("loss.backward()", lambda: backward(unit, input, context)),
        Contender("nn.GRU, torch.func.grad", lambda: func(gru, input)),
    ]
    error = _error(func(unit, input, context), truth)
    compare("torch.func.grad", str(size), contenders, threads=threads, error=error)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_per_sample(compare: Compare, size: Size, threads: int) -> None:
    """nn.GRU is no baseline: torch.vmap of its gradient raises (seen in torch 2.11 and 2.14)."""
    unit = _unit(size)
    input, context = (x.detach() for x in problems.sequence_operands(size, torch.device("cpu")))
    weights = {name: x.detach() for name, x in unit.named_parameters()}

    def per_sample() -> dict[str, Tensor]:
        def of_sample(w: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
            return _loss(Function(unit, w, (x, c)))

        grad = torch.func.grad(of_sample)
        return torch.vmap(grad, in_dims=(None, 1, 0))(weights, input, context)

    def loop(module: nn.Module, input: Tensor, context: Tensor) -> dict[str, Tensor]:
        names, own = zip(*module.named_parameters(), strict=True)
        grads = [
            torch.autograd.grad(_loss(module(input[:, i], context[i])), own)
            for i in range(size.batch)
        ]
        return dict(zip(names, map(torch.stack, zip(*grads, strict=True)), strict=True))

    truth = loop(_exact(unit), input.double(), context.double())
    contenders = [
        Contender("vmap(grad)", per_sample),
        Contender("a backward for each sample", lambda: loop(unit, input, context)),
    ]
    error = _error(per_sample(), truth)
    compare("gradients per sample", str(size), contenders, threads=threads, error=error)
