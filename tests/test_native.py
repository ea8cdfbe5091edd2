"""The extension's calls take fields by name, read every tensor, and name what does not fit."""

from __future__ import annotations

import gc
import resource
import sys
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

from mmixer_kernels import _native
from mmixer_kernels.problem import Call, Form

G, T, B, F, C, H = 2, 3, 2, 4, 5, 6
FORM = Form(G, 8 * G, has_context=True, has_hx=True, has_lengths=True, mix="gated", eps=1e-5)
MATRICES = [(H, F), (H, C), (H, 2 * H), (H, H), (H, H), (H, H), (6, H), (6, H)]
SHAPES = [*[(T, B, F)] * G, *[(B, C)] * G, *MATRICES * G, (G, B, H)]
BESIDE = Call(FORM, "gates", "concatenated")
WITHOUT_CONTEXT = FORM._replace(weights=6 * G, has_context=False)
HX, LENGTHS = len(SHAPES) - 1, len(SHAPES)
WEIGHT_F, WEIGHT_R, NORM_WEIGHT = 2 * G, 2 * G + 3, 2 * G + 6


def tensors() -> list[Tensor]:
    return [*(torch.zeros(shape) for shape in SHAPES), torch.tensor([3, 1])]


def tensors_without_context() -> list[Tensor]:
    one = [(H, F), (H, H), (H, H), (H, H), (4, H), (4, H)]
    sets = [torch.zeros(shape) for shape in one * G]
    return [*tensors()[:G], *sets, *tensors()[HX:]]


def forward(operands: list[Any], call: Any = None, **other: Any) -> Any:
    fields = {"call": call or Call(FORM, "gates"), "tensors": operands, "threads": 1}
    return _native.forward(**fields | {"packed": None} | other)


def backward(operands: list[Any], call: Any = None, **other: Any) -> Any:
    fields = {"call": call or Call(FORM, "gates"), "tensors": operands, "threads": 1}
    return _native.backward(**{"grad_output": None, "grad_h_n": None} | fields | other)


def test_results_have_the_shapes_that_the_call_asks_for() -> None:
    output, h_n, saved = forward(tensors())
    assert (output.shape, h_n.shape, saved.dtype) == ((G, T, B, H), (G, B, H), torch.float32)
    swapped = [x.transpose(0, 1) if x.shape == (T, B, F) else x for x in tensors()]
    output, _, saved = forward(swapped, Call(FORM, "nothing", batch_first=True))
    assert (output.shape, saved) == ((G, B, T, H), None)
    one = [x for x, shape in zip(tensors(), SHAPES, strict=False) if shape != (G, B, H)]
    one = [one[0], one[G], *one[2 * G : 2 * G + 8]]
    form = FORM._replace(groups=1, weights=8, has_hx=False, has_lengths=False, mix="concat")
    assert forward(one, Call(form, "nothing", "sequence"))[0].shape == (T, B, H)


@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_beside_each_other(batch_first: bool) -> None:
    """Each is that of its weight set, and so is each gradient."""
    torch.manual_seed(0)
    operands = [x + torch.randn_like(x) for x in tensors_without_context()[:-1]]
    operands.append(tensors()[LENGTHS])
    form = WITHOUT_CONTEXT._replace(bidirectional=True)
    calls = Call(form, "gates"), Call(form, "gates", "concatenated", batch_first)
    cotangent = torch.randn(G, T, B, H)
    results = []
    for call in calls:
        beside = call.layout == "concatenated"
        grad_output = torch.cat([*cotangent], -1) if beside else cotangent
        given = list(operands)
        if call.batch_first:
            given[:G] = [x.transpose(0, 1) for x in given[:G]]
            grad_output = grad_output.transpose(0, 1)
        output, h_n, saved = forward(given, call)
        needs = [True] * len(given)
        grads = backward(given, call, saved=saved, grad_output=grad_output, needs=needs)
        if call.batch_first:
            output = output.transpose(0, 1)
            grads = [*(x.transpose(0, 1) for x in grads[:G]), *grads[G:]]
        if beside:
            assert output.shape == (T, B, G * H)
            output = torch.stack(output.split(H, -1))
        results.append([output, h_n, saved, *grads[:-1]])
    for apart, beside in zip(*results, strict=True):
        assert torch.equal(apart, beside)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.zeros(T, B), ValueError, "input must have three dimensions"),
        (1, torch.zeros(T + 1, B, F), ValueError, "inputs must agree in T and B"),
        (
            1,
            torch.zeros(T, B, F, dtype=torch.float64),
            ValueError,
            "inputs and contexts must agree",
        ),
        (0, torch.zeros(T, F, B).mT, ValueError, "input must have contiguous rows"),
        (0, torch.zeros(T, B, F, dtype=torch.int16), TypeError, "input must be one of float32"),
        (0, torch.zeros(T, B, F + 1), ValueError, "weight_f must have the shape"),
        (G, torch.zeros(B + 1, C), ValueError, "context must have input's batch size"),
        (G, torch.zeros(B, 0), ValueError, "weight_g must have the shape"),
        (WEIGHT_F, torch.zeros(F, H).T, ValueError, "weight_f must be contiguous"),
        (WEIGHT_F, torch.zeros(2 * H, F)[::2], ValueError, "weight_f must be contiguous"),
        (WEIGHT_F, torch.zeros(H, F).double(), ValueError, "weight_f must have the dtype of its"),
        (WEIGHT_R, torch.zeros(H, H + 1), ValueError, "weight_r must have the shape"),
        (WEIGHT_R, torch.zeros(H), ValueError, "weight_r must have two dimensions"),
        (WEIGHT_R, None, AttributeError, "shape"),
        (NORM_WEIGHT, torch.zeros(5, H), ValueError, "norm_weight must have the shape"),
        (NORM_WEIGHT, torch.zeros(4, H), ValueError, "norm_weight must have the shape"),
        (HX, torch.zeros(1, B, H), ValueError, r"hx must be \[G, B, H\]"),
        (HX, torch.zeros(G, B, H).double(), ValueError, "hx must have input's dtype"),
        (LENGTHS, torch.tensor([3, 1, 1]), ValueError, r"lengths must be \[B\]"),
        (
            LENGTHS,
            torch.tensor([3, 1], dtype=torch.int32),
            TypeError,
            "lengths must be one of int64",
        ),
        (LENGTHS, torch.tensor([3, 9, 1])[::2], ValueError, "lengths must be contiguous"),
        (LENGTHS, torch.tensor([4, 1]), ValueError, r"lengths must be in 1\.\.T"),
        (LENGTHS, torch.tensor([3, 0]), ValueError, r"lengths must be in 1\.\.T"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    place: int, wrong: Any, error: type[Exception], message: str
) -> None:
    operands: list[Any] = tensors()
    operands[place] = wrong
    with pytest.raises(error, match=message):
        forward(operands)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(T, B, F).double(), "inputs and contexts must agree in dtype"),
        (G + 1, torch.zeros(H, 2 * H), "weight_r must have the shape"),
        (G + 4, torch.zeros(6, H), "norm_weight must have the shape"),
        (-2, torch.zeros(B, H), "hx must have three dimensions"),
    ],
)
def test_a_tensor_that_does_not_fit_a_call_without_context_is_named(
    place: int, wrong: Tensor, message: str
) -> None:
    operands = tensors_without_context()
    assert forward(operands, Call(WITHOUT_CONTEXT, "nothing"))[0].shape == (G, T, B, H)
    operands[place] = wrong
    with pytest.raises(ValueError, match=message):
        forward(operands, Call(WITHOUT_CONTEXT, "nothing"))


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ({"mix": "sum"}, TypeError, "mix must be one of gated, concat, not 'sum'"),
        ({"mix": "a.gated"}, TypeError, "mix must be one of gated, concat, not 'a.gated'"),
        ({"mix": Enum("E", "gated").gated}, TypeError, "mix must be one of gated, concat, not <E"),  # type: ignore[attr-defined]
        ({"eps": True}, ValueError, "eps must be a float"),
        ({"eps": "1"}, ValueError, "eps must be a float"),
        ({"eps": 10**400}, ValueError, "eps is too large"),
        ({"eps": float("inf")}, ValueError, "eps must be positive and finite"),
        ({"eps": -1e-5}, ValueError, "eps must be positive and finite"),
        ({"groups": 1.0}, TypeError, "groups must be an integer, not 1.0"),
        ({"groups": 2**63}, ValueError, "groups is too large: 9223372036854775808"),
        ({"weights": 14}, ValueError, "tensors must be as many as the form says"),
        ({"weights": 13}, ValueError, "weights must be sets"),
        ({"has_hx": 1}, TypeError, "has_hx must be True or False, not 1"),
        ({"has_context": 1}, TypeError, "has_context must be True or False, not 1"),
        ({"has_context": False}, ValueError, "tensors must be as many as the form says"),
        ({"has_context": False, "weights": 9 * G}, ValueError, "a weight set must have four"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be True or False, not 1"),
        ({"groups": 1, "bidirectional": True}, ValueError, "bidirectional must be of an even"),
    ],
)
def test_a_form_that_does_not_fit_is_named(
    form: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        forward(tensors(), Call(FORM._replace(**form), "gates"))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"call": (1, 2)}, TypeError, "must be a named tuple of problem.py"),
        ({"call": Call(FORM, "all")}, TypeError, "keep must be one of nothing, .*, not 'all'"),  # type: ignore[arg-type]
        ({"call": Call(FORM, "gates", "sequence")}, ValueError, "layout must be group or concat"),
        ({"tensors": 1}, TypeError, "must be a sequence"),
        ({"threads": 2**31}, ValueError, "threads is too large: 2147483648"),
        ({"threads": "1"}, TypeError, "threads must be an integer, not '1'"),
        ({"thread": 1}, TypeError, "forward has no thread"),
    ],
)
def test_a_wrong_field_is_named(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        forward(tensors(), **fields)


def test_a_call_needs_every_field() -> None:
    with pytest.raises(TypeError, match=r"^forward lacks tensors"):
        _native.forward(call=Call(FORM, "gates"), threads=1)
    with pytest.raises(TypeError, match=r"^forward takes its fields by name alone"):
        _native.forward(Call(FORM, "gates"))


def test_a_list_that_changes_during_the_call() -> None:
    operands: list[Any] = tensors()
    first = operands[0]

    class Changing:
        def data_ptr(self) -> int:
            operands.clear()
            gc.collect()
            return first.data_ptr()

        def __getattr__(self, name: str) -> Any:
            return getattr(first, name)

    operands[0] = Changing()
    assert forward(operands)[0].shape == (G, T, B, H)
    assert operands == []


def test_a_call_without_memory_tells_how_much_it_needs() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    many = torch.zeros(1, 1, 1).expand(1 << 24, 1, 1)  # results fit below, a workspace does not
    matrices = [torch.zeros(1, 1) for _ in range(4)]
    call = Call(Form(1, 4, False, False, False, "gated", 1e-5), "nothing", "sequence")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        with pytest.raises(
            MemoryError, match=r"needs \d+ bytes to work in, .*: call it with fewer"
        ):
            forward([many, *matrices], call)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    forward([many[:3], *matrices], call)


def test_gradients_of_what_is_needed() -> None:
    operands = tensors()
    saved = forward(operands)[2]
    ones = torch.ones(G, T, B, H)

    def needed(*places: int, more: tuple[bool, ...] = ()) -> list[int]:
        needs = [*(place in places for place in range(len(operands))), *more]
        grads = backward(operands, saved=saved, grad_output=ones, needs=needs)
        for place, grad in enumerate(grads):
            assert grad is None or grad.shape == operands[place].shape
        return [place for place, grad in enumerate(grads) if grad is not None]

    assert needed() == []
    assert needed(1) == [0, 1]
    assert needed(G) == list(range(G, 2 * G))
    assert needed(WEIGHT_R, HX) == list(range(WEIGHT_F, HX + 1))
    with pytest.raises(ValueError, match="needs must be as many as tensors"):
        needed(more=(True,))


def test_what_backward_gets_is_named_where_it_does_not_fit() -> None:
    operands = tensors()
    saved = forward(operands)[2]
    for wrong, message in [
        ({"saved": saved[1:]}, "saved must be what forward left"),
        ({"saved": saved.double()}, "saved must be what forward left"),
        ({"saved": torch.stack([saved, saved], 1)[:, 0]}, "saved must have contiguous rows"),
        ({"grad_output": torch.ones(T, B, H)}, "grad_output must have four dimensions"),
        ({"grad_output": torch.ones(G, T, B, H + 1)}, "grad_output must have output's shape"),
        ({"grad_output": torch.ones(G, T, B, H).double()}, "grad_output must have output's dtype"),
        ({"grad_h_n": torch.ones(1, B, H)}, "grad_h_n must have h_n's shape"),
        (
            {"call": BESIDE, "grad_output": torch.ones(T, B, H)},
            "grad_output must have output's shape",
        ),
        (
            {"call": BESIDE, "grad_output": torch.ones(G, T, B, H)},
            "grad_output must have three dimensions",
        ),
    ]:
        needs = [True] * len(operands)
        with pytest.raises(ValueError, match=message):
            backward(operands, **{"saved": saved, "needs": needs, **wrong})


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_step_that_does_not_fit_is_named(place: int) -> None:
    form = FORM._replace(groups=1, weights=8, has_lengths=False)
    call = Call(form, "nothing", "step")
    operands = [torch.zeros(x) for x in [(B, F), (B, C), *MATRICES, (B, H)]]
    output, h_n, saved = forward(operands, call)
    assert (output.shape, h_n, saved) == ((B, H), None, None)
    operands[place] = operands[place][None]
    with pytest.raises(ValueError, match=r"(input|context|hx) must have two dimensions"):
        forward(operands, call)
    with pytest.raises(ValueError, match="layout must not be step with batch_first or lengths"):
        forward(operands, call._replace(batch_first=True))


STEP = Call(FORM._replace(groups=1, weights=8, has_lengths=False), "nothing", "step")


def layer(**other: Any) -> list[Any]:
    """The tensors of a step."""
    shapes = {"input": (B, F), "context": (B, C), **dict(enumerate(MATRICES)), "hx": (B, H)}
    return list(({name: torch.zeros(shape) for name, shape in shapes.items()} | other).values())


def stream(layers: Any, call: Call = STEP) -> Any:
    return _native.stream(call=call, layers=layers, threads=1)


def test_a_stream_that_does_not_fit_is_named() -> None:
    without_hx = STEP._replace(form=STEP.form._replace(has_hx=False))
    for layers, call, message in [
        ([layer()], STEP._replace(keep="gates"), "call must be a step from a state"),
        ([layer()[:-1]], without_hx, "call must be a step from a state"),
        ([tensors()], Call(FORM, "nothing"), "call must be a step from a state"),
        ([], STEP, "layers must not be empty"),
        ([layer()[:-1]], STEP, "tensors must be as many as the form says"),
        ([layer(hx=torch.zeros(B, 2 * H)[:, :H])], STEP, "hx must be contiguous"),
        ([layer(hx=torch.zeros(B, H).double())], STEP, "hx must have input's dtype"),
        ([layer(), layer(input=torch.zeros(0, F))], STEP, "must have input's batch size"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(layers, call)
    opened = stream([layer()])
    for wrong, message in [
        (torch.zeros(F), "input must have two dimensions"),
        (torch.zeros(B + 1, F), "input must have the shape and dtype"),
        (torch.zeros(B, F + 1), "input must have the shape and dtype"),
        (torch.zeros(B, F).double(), "input must have the shape and dtype"),
        (torch.zeros(F, B).T, "input must have contiguous rows"),
        (torch.zeros(B, F, device="meta"), "input must have its values in memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            opened.step(wrong)
    with pytest.raises(AttributeError, match="shape"):
        opened.step(1.0)


def test_a_stream_keeps_its_tensors_while_it_is_open() -> None:
    operands = layer()
    counts = [sys.getrefcount(x) for x in operands]
    opened = stream([operands])
    assert all(sys.getrefcount(x) > n for x, n in zip(operands, counts, strict=True))
    opened.step(operands[0])
    del opened
    assert [sys.getrefcount(x) for x in operands] == counts


def test_a_tensors_own_error_passes() -> None:
    def body(x: Tensor) -> Tensor:
        forward([x, *tensors()[1:]])
        return x

    with pytest.raises(RuntimeError, match="storage"):
        torch.vmap(body)(torch.zeros(2, T, B, F))


def test_nothing_is_kept_of_the_values() -> None:
    operands = tensors()
    call = Call(FORM, "gates")
    watched = [*operands, torch.float32, torch.int64, call, FORM]
    forward(operands, call)  # which learns the dtypes' objects
    counts = [sys.getrefcount(x) for x in watched]
    for _ in range(50):
        saved = forward(operands, call)[2]
        zeros = torch.zeros(1).expand(G, T, B, H)
        backward(operands, call, saved=saved, grad_output=zeros, needs=[True] * len(operands))
        with pytest.raises(ValueError, match="weights must be sets"):
            forward(operands, Call(FORM._replace(weights=13), "gates"))
    assert [sys.getrefcount(x) for x in watched] == counts
