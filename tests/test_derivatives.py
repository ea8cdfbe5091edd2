"""torch.func and the vmaps over calls with hx, lengths and several groups, against loops over calls
in float64; the tools in general are in tests/tools.py."""

import pytest
import torch
from helpers import Size, problem
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from mmixer_kernels import reference
from mmixer_kernels.functional import mcu, mcu_group
from mmixer_kernels.reference import Weights

SIZE, CALLS = Size(3, 2, 3, 2, 4), 3
GROUPS = 2


FORMS = ("groups", "directions", "directions without context")


def operands(form="groups", hx=True, lengths=True, layer_norm=True):
    """Operands of `run`, and of several calls with them: of two weight sets, each with an input of
    its own or both with one."""
    size = SIZE._replace(context=0) if form.endswith("without context") else SIZE
    problems = [problem(size, layer_norm=layer_norm) for _ in range(GROUPS)]
    own = problems if form == "groups" else problems[:1]
    one = {
        "inputs": [p.input for p in own],
        "contexts": [p.context for p in own if p.context is not None],
        "weights": [p.weights.tensors() for p in problems],
    }
    if hx:
        one["hx"] = torch.stack([p.hx for p in problems])
    many = pytree.tree_map(lambda x: torch.stack([x, 0.5 * x, x.cos()]), one)
    if lengths:
        one["lengths"] = torch.tensor([1, 3])
        many["lengths"] = torch.tensor([[1, 3], [3, 2], [2, 2]])
    return one, many


def sets_of(operands):
    has_context = bool(operands["contexts"])
    return [Weights.sets(tensors, 1, has_context)[0] for tensors in operands["weights"]]


def run(operands, engine="cpu", **options):
    options |= {"hx": operands.get("hx"), "lengths": operands.get("lengths"), "engine": engine}
    inputs, contexts, sets = operands["inputs"], operands["contexts"], sets_of(operands)
    if len(inputs) == len(sets):
        return mcu_group(inputs, contexts, sets, **options)
    return mcu(inputs[0], contexts[0] if contexts else None, tuple(sets), **options)


def equations(operands, mix="gated", **_):
    inputs, contexts, sets = operands["inputs"], operands["contexts"], sets_of(operands)
    are_groups = len(inputs) == len(sets)
    results = [
        reference.mcu(
            inputs[g if are_groups else 0],
            contexts[g if are_groups else 0] if contexts else None,
            sets[g],
            operands["hx"][g] if "hx" in operands else None,
            operands.get("lengths"),
            mix=mix,
            reverse=g == 1 and not are_groups,
            layer_norm=reference.layer_norm,
        )
        for g in range(GROUPS)
    ]
    outputs, states = zip(*results, strict=True)
    return torch.stack(outputs) if are_groups else torch.cat(outputs, -1), torch.stack(states)


def batched(names, one, many):
    """Operands of which the named are of several calls, and their dimensions."""
    chosen = {name: (many if name in names else one)[name] for name in one}
    return chosen, {
        name: pytree.tree_map(lambda _, name=name: 0 if name in names else None, chosen[name])
        for name in one
    }


def each_call(function, names, one, many):
    def call(i):
        own = pytree.tree_map(lambda x: x[i], many)
        return function({name: (own if name in names else one)[name] for name in one})

    return pytree.tree_map(lambda *x: torch.stack(x), *map(call, range(CALLS)))


def squares(results):
    return sum(x.square().sum() for x in pytree.tree_leaves(results))


def differentiable(operands):
    return {name: x for name, x in operands.items() if name != "lengths"}


def gradient(function):
    """The derivatives are those with respect to everything but lengths."""

    def of(operands):
        def loss(named):
            return squares(function({**operands, **named}))

        return torch.func.grad(loss)(differentiable(operands))

    return of


NAMES = [
    ("inputs",),
    ("contexts",),
    ("hx",),
    ("lengths",),
    ("inputs", "contexts", "hx", "lengths"),
    ("weights",),
    ("weights", "inputs", "hx"),
    ("weights", "lengths"),
]
FORMED = [
    pytest.param(form, names, id=f"{form}: {'+'.join(names)}")
    for form in FORMS
    for names in NAMES
    if names != ("contexts",) or not form.endswith("without context")
]
every_form = pytest.mark.parametrize(("form", "names"), FORMED)


def assert_close(results, truth):
    torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-11)


@every_form
@pytest.mark.parametrize("layer_norm", [True, False])
def test_vmap(form, names, layer_norm):
    one, many = operands(form, layer_norm=layer_norm)
    chosen, dims = batched(names, one, many)
    results = torch.vmap(run, in_dims=(dims,))(chosen)
    assert_close(results, each_call(equations, names, one, many))


@every_form
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_in_vmap(form, names, recompute):
    """A vmap over gradients gives each call's own."""
    one, many = operands(form)
    chosen, dims = batched(names, one, many)
    ours = gradient(lambda x: run(x, recompute=recompute))
    results = torch.vmap(ours, in_dims=(dims,))(chosen)
    assert_close(results, each_call(gradient(equations), names, one, many))


@every_form
def test_gradient_of_vmap(form, names):
    """The gradient of a vmap is that of all calls."""
    one, many = operands(form)
    chosen, dims = batched(names, one, many)
    results = gradient(torch.vmap(run, in_dims=(dims,)))(chosen)
    truth = gradient(lambda x: torch.vmap(equations, in_dims=(dims,))(x))(chosen)
    assert_close(results, truth)


@every_form
def test_backward_through_vmap(form, names):
    one, many = operands(form)
    chosen, dims = batched(names, one, many)
    chosen = {**chosen, **pytree.tree_map(torch.Tensor.requires_grad_, differentiable(chosen))}
    wanted = pytree.tree_leaves(differentiable(chosen))
    ours = torch.autograd.grad(squares(torch.vmap(run, in_dims=(dims,))(chosen)), wanted)
    truth = torch.autograd.grad(squares(torch.vmap(equations, in_dims=(dims,))(chosen)), wanted)
    assert_close(ours, truth)


def test_backward_through_vmap_computes_no_forward_again():
    p = problem(SIZE)
    loss = squares(
        torch.vmap(lambda x: mcu(x, p.context, p.weights, engine="cpu"))(
            torch.stack([p.input, p.input]).requires_grad_()
        )
    )
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert torch.ops.mmixer_kernels.mcu_forward not in counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [False, True])
def test_batched_gradients(form, lengths):
    """The vmap of torch.autograd, nested as in a second derivative of several directions."""
    one, _ = operands(form, lengths=lengths)
    wanted = pytree.tree_leaves(pytree.tree_map(torch.Tensor.requires_grad_, differentiable(one)))

    def directions(function):
        results = function(one)
        several = [torch.stack([torch.ones_like(x), x.detach()]) for x in results]
        return torch.autograd.grad(
            results, wanted, several, is_grads_batched=True, create_graph=True
        )

    first = directions(run), directions(equations)
    assert_close(*first)
    second = [
        torch.autograd.grad(
            grads,
            wanted,
            [torch.stack([torch.ones_like(x), torch.zeros_like(x)]) for x in grads],
            is_grads_batched=True,
        )
        for grads in first
    ]
    assert_close(*second)


@pytest.mark.parametrize("inner", [0, 1])
def test_vmap_of_one_call_and_without_samples(inner):
    size = SIZE._replace(batch=inner)
    p = problem(size)

    def function(x, w):
        return mcu(x, p.context, Weights(*w))[0]

    results = torch.vmap(function, in_dims=(0, None))(p.input[None], tuple(p.weights))
    assert results.shape == (1, size.steps, size.batch, size.hidden)
    weights = tuple(w[None] for w in p.weights)
    assert_close(torch.vmap(function, in_dims=(None, 0))(p.input, weights), results)


def test_results_may_be_changed_in_place():
    """Backward does not read them, as outside torch.func."""
    p = problem(SIZE)

    def loss(x):
        output, h_n = mcu(x, p.context, p.weights, engine="cpu")
        return squares((output.mul_(2), h_n.add_(1)))

    x = p.input.clone().requires_grad_()
    assert_close(torch.func.grad(loss)(p.input), torch.autograd.grad(loss(x), x)[0])


def scalar(p):
    """A function of the input, by the CPU engine."""
    return lambda x: squares(mcu(x, p.context, p.weights, engine="cpu"))


def test_derivatives_of_order_three():
    p = problem(Size(2, 1, 2, 2, 3))

    def squared_gradient(function):
        return lambda x: squares(torch.func.grad(function)(x))

    by_func = squared_gradient(squared_gradient(squared_gradient(scalar(p))))(p.input)
    x = p.input.clone().requires_grad_()
    value = scalar(p)(x)
    for _ in range(3):
        value = squares(torch.autograd.grad(value, x, create_graph=True)[0])
    assert_close(by_func, value.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own use
def test_forward_mode_of_order_three():
    """jvp(f, x, x) is the derivative x . grad f."""
    p = problem(Size(2, 1, 2, 2, 3))

    def forward(function):
        return lambda x: torch.func.jvp(function, (x,), (x,))[1]

    def reverse(function):
        return lambda x: (torch.func.grad(function)(x) * x).sum()

    by_forward, by_reverse = (way(way(way(scalar(p))))(p.input) for way in (forward, reverse))
    assert_close(by_forward, by_reverse)
