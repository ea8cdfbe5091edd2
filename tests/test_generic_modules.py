"""The properties that PyTorch tests for every module of its own, of ours beside nn.GRU's.

A property is one test over one table. A row that nn.GRU holds and ours does not is a strict xfail.
"""

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

from mmixer_kernels import FusedMCU, FusedMCUCell, FusedMCUStack, MMixer
from mmixer_kernels.engines import of_device
from mmixer_kernels.reference import MCU

T, B, F, C, H, CLASSES = 2, 3, 2, 4, 5, 6
SHAPES: dict[str, tuple[dict[str, bool], dict[str, tuple[int, ...]]]] = {
    "": ({}, {"input": (T, B, F), "context": (B, C), "hx": (1, B, H)}),
    "-batch_first": (
        {"batch_first": True},
        {"input": (B, T, F), "context": (B, C), "hx": (1, B, H)},
    ),
    "-unbatched": ({}, {"input": (T, F), "context": (C,), "hx": (1, H)}),
    "-without_hx": ({}, {"input": (T, B, F), "context": (B, C)}),
}
SHAPES_OF_CELLS: dict[str, dict[str, tuple[int, ...]]] = {
    "": {"input": (B, F), "context": (B, C), "hx": (B, H)},
    "-unbatched": {"input": (F,), "context": (C,), "hx": (H,)},
    "-without_hx": {"input": (B, F), "context": (B, C)},
}


class Case(NamedTuple):
    """A module, and the names and shapes of the tensors that it is called with."""

    kind: type[nn.Module]
    sizes: tuple[Any, ...]
    options: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same values at each call."""
        torch.manual_seed(1)
        return self.kind(*self.sizes, **self.options).to(dtype)

    def inputs(
        self, dtype: torch.dtype = torch.float32, requires_grad: bool = False
    ) -> list[Tensor]:
        """The same values at each call."""
        generator = torch.Generator().manual_seed(2)
        return [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
            for shape in self.shapes.values()
        ]


def _cases() -> Iterator[tuple[str, Case]]:
    def gru(kind: type[nn.Module], shapes: dict[str, tuple[int, ...]], **options: Any) -> Case:
        own = {name: shape for name, shape in shapes.items() if name != "context"}
        return Case(kind, (F, H), options, own)

    def mcu(kind: type[nn.Module], shapes: dict[str, tuple[int, ...]], **options: Any) -> Case:
        return Case(kind, (F, C, H), options, shapes)

    def mixer(batch_first: bool = True, **options: Any) -> Case:
        steps = (B, T) if batch_first else (T, B)
        shapes = {f"features[{i}]": (*steps, size) for i, size in enumerate((F, C))}
        options = {"hidden_size": H, "batch_first": batch_first, **options}
        return Case(MMixer, ((F, C), CLASSES), options, shapes)

    for name, (options, shapes) in SHAPES.items():
        yield f"GRU{name}", gru(nn.GRU, shapes, **options)
        yield f"FusedMCU-cpu{name}", mcu(FusedMCU, shapes, engine="cpu", **options)
    for name, shapes in SHAPES_OF_CELLS.items():
        yield f"GRUCell{name}", gru(nn.GRUCell, shapes)
        yield f"FusedMCUCell-cpu{name}", mcu(FusedMCUCell, shapes, engine="cpu")
    _, shapes = SHAPES[""]
    yield "FusedMCU-cpu-recompute", mcu(FusedMCU, shapes, engine="cpu", recompute=True)
    yield "FusedMCU-reference", mcu(FusedMCU, shapes, engine="reference")
    yield "FusedMCUCell-reference", mcu(FusedMCUCell, SHAPES_OF_CELLS[""], engine="reference")
    for engine in (each.NAME for each in of_device(torch.device("cpu"))):
        yield f"MMixer-{engine}", mixer(engine=engine)
        for name, options in (
            ("without_norm", {"layer_norm": False}),
            ("concat", {"mix": "concat"}),
        ):
            yield f"FusedMCU-{engine}-{name}", mcu(FusedMCU, shapes, engine=engine, **options)
    yield (
        "FusedMCUCell-cpu-without_norm",
        mcu(FusedMCUCell, SHAPES_OF_CELLS[""], engine="cpu", layer_norm=False),
    )
    yield "MMixer-cpu-without_norm", mixer(engine="cpu", layer_norm=False)
    yield "MMixer-cpu-time_first", mixer(False, engine="cpu", summarizer="max")
    yield "MMixer-gru", mixer(unit="gru")
    yield from _without_context()
    yield from _stacks()


def _without_context() -> Iterator[tuple[str, Case]]:
    """The first state stands in the context's place, as nn.GRU has it."""
    shapes, of_cells = (
        {name: shape for name, shape in table.items() if name != "context"}
        for table in (SHAPES[""][1], SHAPES_OF_CELLS[""])
    )
    yield "MCU-bare", Case(MCU, (F, 0, H), {}, shapes)
    for engine in ("cpu", "reference"):
        yield f"FusedMCU-{engine}-bare", Case(FusedMCU, (F, 0, H), {"engine": engine}, shapes)
    yield "FusedMCUCell-cpu-bare", Case(FusedMCUCell, (F, 0, H), {"engine": "cpu"}, of_cells)


def _stacks() -> Iterator[tuple[str, Case]]:
    """Stacks of two layers: in both directions with a context, and without one in each layout."""
    both = {"num_layers": 2, "bidirectional": True}
    for name, (options, shapes) in SHAPES.items():
        own = {key: shape for key, shape in shapes.items() if key != "context"}
        if "hx" in own:
            own["hx"] = (4, *own["hx"][1:])
        if not name:
            yield "GRU-stack", Case(nn.GRU, (F, H), both, own)
            options = {"engine": "reference"}
            yield "FusedMCUStack-reference", Case(FusedMCUStack, (F, 0, H), both | options, own)
            own = shapes | own
        options = both | options | {"engine": "cpu"}
        yield (
            f"FusedMCUStack-cpu{name}",
            Case(FusedMCUStack, (F, 0 if name else C, H), options, own),
        )
    one = {"num_layers": 2, "engine": "cpu", "recompute": True}
    shapes = {"input": (T, B, F), "hx": (2, B, H)}
    yield "FusedMCUStack-cpu-one_direction", Case(FusedMCUStack, (F, 0, H), one, shapes)


CASES = dict(_cases())


def every_module(
    *failing: tuple[str, str], where: Callable[[Case], bool] = lambda case: True
) -> pytest.MarkDecorator:
    """The test runs once per row of the table.

    Args:
        failing: regular expressions of how the names of rows begin that fail, each with the reason.
        where: false for a row that the property says nothing about.
    """
    rows = []
    for name, case in CASES.items():
        reasons = [reason for pattern, reason in failing if re.match(pattern, name)]
        marks = [pytest.mark.xfail(strict=True, reason=reason) for reason in reasons]
        if where(case):
            rows.append(pytest.param(case, id=name, marks=marks))
    return pytest.mark.parametrize("case", rows)


def call(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs as a tuple."""
    result = module(inputs) if isinstance(module, MMixer) else module(*inputs)
    return result if isinstance(result, tuple) else (result,)


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


def results(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of every input and parameter that wants one."""
    outputs = call(module, inputs)
    wanted = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    return [*outputs, *torch.autograd.grad(loss(outputs), wanted)]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_module()
def test_forward(case: Case) -> None:
    """Every call gives equal bits, in eval mode too, and the reference's results to rounding."""
    module, inputs = case.build(), case.inputs()
    first = call(module, inputs)
    assert all(output.requires_grad and output.isfinite().all() for output in first)
    assert_equal(call(module, inputs), first)
    assert_equal(call(module.eval(), inputs), first)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            plain = call(module, inputs)
        assert not any(output.requires_grad for output in plain)
        torch.testing.assert_close(plain, first)
    options = case.options | ({"engine": "reference"} if "engine" in case.options else {})
    reference = case._replace(options=options).build(torch.float64)
    truth = call(reference, case.inputs(torch.float64))
    torch.testing.assert_close(first, truth, rtol=1e-5, atol=1e-6, check_dtype=False)


@every_module()
def test_repr(case: Case) -> None:
    assert case.kind.__name__ in repr(case.build())
    assert str(case.build()) == repr(case.build())


@every_module()
def test_keywords(case: Case) -> None:
    module, inputs = case.build(), case.inputs()
    if case.kind is MMixer:
        result = module(features=inputs)
    else:
        result = module(**dict(zip(case.shapes, inputs, strict=True)))
    assert_equal(result if isinstance(result, tuple) else (result,), call(module, inputs))


@every_module()
def test_factory_arguments(case: Case) -> None:
    for device in ("cpu", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            module = case.kind(*case.sizes, **case.options, device=device, dtype=dtype)
            for tensor in (*module.parameters(), *module.buffers()):
                assert (tensor.device.type, tensor.dtype) == (device, dtype)


@every_module()
def test_default_dtype_and_device(case: Case) -> None:
    expected, inputs = case.build(torch.float64), case.inputs(torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            module = case.kind(*case.sizes, **case.options)
    finally:
        torch.set_default_dtype(torch.float32)
    for tensor, like in zip(module.parameters(), expected.parameters(), strict=True):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.float64)
        assert (tensor.shape, tensor.stride()) == (like.shape, like.stride())
    module.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert_equal(call(module, inputs), call(expected, inputs))


@every_module(
    (r"GRU\b", "nn.GRU's signature does not name device"),
)
def test_skip_init(case: Case) -> None:
    module = nn.utils.skip_init(case.kind, *case.sizes, **case.options, dtype=torch.float64)
    module.load_state_dict(case.build(torch.float64).state_dict())
    inputs = case.inputs(torch.float64)
    assert_equal(call(module, inputs), call(case.build(torch.float64), inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_module()
def test_to_dtype(case: Case, dtype: torch.dtype) -> None:
    move = {
        torch.float64: nn.Module.double,
        torch.bfloat16: nn.Module.bfloat16,
        torch.float16: nn.Module.half,
    }[dtype]
    module = case.build()
    next(module.parameters()).requires_grad_(False)
    frozen = [parameter.requires_grad for parameter in module.parameters()]
    outputs = call(move(module), case.inputs(dtype))
    assert {x.dtype for x in (*outputs, *module.parameters())} == {dtype}
    assert [parameter.requires_grad for parameter in module.parameters()] == frozen
    tolerance = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    truth = call(case.build(), case.inputs())
    torch.testing.assert_close(outputs, truth, rtol=0, atol=tolerance, check_dtype=False)
    grads = torch.autograd.grad(loss(outputs), [p for p in module.parameters() if p.requires_grad])
    assert {grad.dtype for grad in grads} == {dtype}


@pytest.fixture(params=[False, True], ids=["set", "swapped"])
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """The way in which `Module.to` replaces a parameter: by its data, or by swapping tensors."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_module()
@pytest.mark.usefixtures("conversion")
def test_to_and_back(case: Case) -> None:
    """A module survives a way through float64, gradients included, and one through meta."""
    module = case.build()
    expected = call(module, case.inputs())
    loss(expected).backward()
    module.to(torch.float64, non_blocking=True)
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float64}
    call(module, case.inputs(torch.float64))
    module.to("cpu", torch.float32)
    assert_equal(call(module, case.inputs()), tuple(x.detach() for x in expected))
    module.to("meta")
    inputs = [x.to("meta") for x in case.inputs()]
    if case.options.get("engine") == "cpu":
        with pytest.raises(ValueError, match="it takes tensors on cpu, but input is on meta"):
            call(module, inputs)
    else:
        meta = call(module, inputs)
        assert [(x.shape, x.device.type) for x in meta] == [(x.shape, "meta") for x in expected]
        grads = torch.autograd.grad(loss(meta), list(module.parameters()))
        assert [g.shape for g in grads] == [p.shape for p in module.parameters()]
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), case.build().parameters(), strict=True):
            parameter.copy_(value)
    assert_equal(call(module, case.inputs()), expected)


@every_module()
def test_memory_format(case: Case) -> None:
    """None of the parameters has the four dimensions that a format would order."""
    expected = results(case.build(), case.inputs(requires_grad=True))
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
        module = case.build().to(memory_format=memory_format)
        assert_equal(results(module, case.inputs(requires_grad=True)), expected)


@every_module()
def test_pickle(case: Case) -> None:
    module, inputs = case.build(), case.inputs()
    expected = call(module, inputs)
    twin = pickle.loads(pickle.dumps(module))
    assert_equal(call(twin, inputs), expected)
    for value, weights_only in ((module, False), (tuple(x.detach() for x in expected), True)):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        assert_equal(loaded if weights_only else call(loaded, inputs), expected)


@every_module()
def test_state_dict(case: Case) -> None:
    module, inputs = case.build(), case.inputs()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == [name for name, _ in module.named_parameters()]
    for assign in (False, True):
        torch.manual_seed(3)
        other = case.kind(*case.sizes, **case.options)
        assert not torch.equal(call(other, inputs)[0], call(module, inputs)[0])
        other.load_state_dict(state, strict=True, assign=assign)
        assert_equal(call(other, inputs), call(module, inputs))
    name, value = state.popitem()
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict({**state, name: value.new_empty(7, 7)})


@every_module()
def test_deepcopy(case: Case) -> None:
    module, inputs = case.build(), case.inputs()
    expected = call(module, inputs)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert_equal(call(twin, inputs), expected)
    assert call(module, inputs)[0].isnan().any()


@every_module()
def test_share_memory(case: Case) -> None:
    module = case.build().share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    assert_equal(call(module, case.inputs()), call(case.build(), case.inputs()))


def spread(x: Tensor) -> Tensor:
    """The same values, every second element of memory that is otherwise NaN."""
    memory = x.new_full((*x.shape, 2), torch.nan)
    memory[..., 0] = x.detach()
    return memory[..., 0]


@pytest.mark.parametrize("which", ["inputs", "parameters", "gradients", "all"])
@every_module()
def test_non_contiguous(case: Case, which: str) -> None:
    def computed(chosen: str) -> list[Tensor]:
        inputs, module = case.inputs(), case.build()
        if chosen in ("inputs", "all"):
            inputs = [spread(x) for x in inputs]
        if chosen in ("parameters", "all"):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.set_(spread(parameter))
        outputs = call(module, [x.requires_grad_() for x in inputs])
        cotangents = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outputs]
        if chosen in ("gradients", "all"):
            cotangents = [spread(x) for x in cotangents]
        wanted = [*inputs, *module.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents)]

    torch.testing.assert_close(computed(which), computed(""))


def function_of_all(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The module in float64 as a function of its inputs and parameters, and these."""
    module = case.build(torch.float64)
    names = [name for name, _ in module.named_parameters()]
    inputs = case.inputs(torch.float64, requires_grad=True)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors[: len(inputs)])
        weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        arguments = (given,) if case.kind is MMixer else tuple(given)
        result = torch.func.functional_call(module, weights, arguments)
        return result if isinstance(result, tuple) else (result,)

    return function, [*inputs, *(p.detach().requires_grad_() for p in module.parameters())]


@every_module()
def test_functional_call(case: Case) -> None:
    function, tensors = function_of_all(case)
    doubled = [tensors[i] if i < len(case.shapes) else 2 * t for i, t in enumerate(tensors)]
    module = case.build(torch.float64)
    expected = call(module, case.inputs(torch.float64))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    assert_equal(function(*doubled), call(module, case.inputs(torch.float64)))
    assert_equal(function(*tensors), expected)


@every_module()
def test_gradcheck(case: Case) -> None:
    assert torch.autograd.gradcheck(*function_of_all(case), fast_mode=True)


@every_module(where=lambda case: case.options.get("engine") != "reference")  # it is that of "cpu"
def test_gradgradcheck(case: Case) -> None:
    assert torch.autograd.gradgradcheck(*function_of_all(case), fast_mode=True)


def directional(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[Tensor]]:
    """The module in float64, frozen, as a function of its inputs; these, and a direction."""
    module, primals = case.build(torch.float64).requires_grad_(False), case.inputs(torch.float64)
    tangents = [torch.linspace(-1, 1, x.numel()).to(x).view(x.shape) for x in primals]
    return lambda *inputs: call(module, list(inputs)), primals, tangents


def derivative(
    function: Callable[..., tuple[Tensor, ...]], primals: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative by differences, right to about 1e-9."""
    above, below = (
        function(*(x + step * t for x, t in zip(primals, tangents, strict=True)))
        for step in (1e-6, -1e-6)
    )
    return tuple((a - b) / 2e-6 for a, b in zip(above, below, strict=True))


@every_module(("MCU", "that of PyTorch's layer_norm, which the reference has, is wrong"))
def test_third_derivative(case: Case) -> None:
    function, primals, tangents = directional(case)

    def second(*inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """The inputs as leaves, and the second derivative along the direction, differentiable."""
        values = [x.detach().requires_grad_() for x in inputs]
        total = torch.stack([x.sin().sum() for x in function(*values)]).sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, values, create_graph=True)
            total = torch.stack([(g * t).sum() for g, t in zip(grads, tangents, strict=True)]).sum()
        return values, total

    values, total = second(*primals)
    grads = torch.autograd.grad(total, values)
    actual = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    (expected,) = derivative(lambda *inputs: (second(*inputs)[1],), primals, tangents)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


# torch's own forward mode uses torch.jit.script, of whose deprecation it then warns.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@forward_mode
@every_module()
def test_forward_mode(case: Case) -> None:
    function, tensors = function_of_all(case)
    assert torch.autograd.gradcheck(
        function, tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


@forward_mode
@every_module()
def test_func_jvp(case: Case) -> None:
    function, primals, tangents = directional(case)
    _, actual = torch.func.jvp(function, tuple(primals), tuple(tangents))
    expected = derivative(function, primals, tangents)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@forward_mode
@every_module()
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_dual_levels(case: Case, grad_mode: type) -> None:
    function, primals, tangents = directional(case)
    with grad_mode(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        actual = tuple(forward_ad.unpack_dual(x).tangent for x in function(*duals))
    expected = derivative(function, primals, tangents)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@every_module()
def test_batched_gradients(case: Case) -> None:
    function, tensors = function_of_all(case)
    assert torch.autograd.gradcheck(function, tensors, check_batched_grad=True, fast_mode=True)


@every_module()
def test_func_grad(case: Case) -> None:
    function, tensors = function_of_all(case)
    grads = torch.func.grad(lambda values: loss(function(*values)))(tensors)
    expected = torch.autograd.grad(loss(function(*tensors)), tensors)
    torch.testing.assert_close(tuple(grads), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of GRUCell's
@pytest.mark.parametrize("over", ["inputs", "parameters", "both"])
@every_module((r"GRU\b|MMixer-gru", "nn.GRU has none either"))
def test_vmap(case: Case, over: str) -> None:
    function, tensors = function_of_all(case)
    count = len(case.shapes)
    mapped = [over == "both" or (over == "inputs") == (i < count) for i in range(len(tensors))]
    many = [
        torch.stack([x, x.flip(-1), 2 * x]) if m else x
        for x, m in zip(tensors, mapped, strict=True)
    ]
    actual = torch.vmap(function, tuple(0 if m else None for m in mapped))(*many)
    each = [
        function(*(x[i] if m else x for x, m in zip(many, mapped, strict=True))) for i in range(3)
    ]
    torch.testing.assert_close(actual, tuple(torch.stack(x) for x in zip(*each, strict=True)))


@every_module()
def test_each_output_alone(case: Case) -> None:
    """Unused outputs have gradients of zero, and the sum is that of all of them."""
    module, inputs = case.build(torch.float64), case.inputs(torch.float64, requires_grad=True)
    wanted = [*inputs, *module.parameters()]
    outputs = call(module, inputs)
    alone = [
        torch.autograd.grad(call(module, inputs)[i].sum(), wanted) for i in range(len(outputs))
    ]
    together = torch.autograd.grad([x.sum() for x in outputs], wanted)
    sums = tuple(torch.stack(grads).sum(0) for grads in zip(*alone, strict=True))
    torch.testing.assert_close(sums, together)


@every_module()
def test_backward_twice(case: Case) -> None:
    module = case.build()
    total = loss(call(module, case.inputs()))
    total.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in module.parameters()]
    total.backward()
    assert_equal([parameter.grad for parameter in module.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()
    module.zero_grad(set_to_none=False)
    assert not any(parameter.grad.any() for parameter in module.parameters())
    loss(call(module, case.inputs())).backward()
    assert_equal([parameter.grad for parameter in module.parameters()], once)
    module.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in module.parameters())


@every_module()
def test_frozen_parameters(case: Case) -> None:
    """One parameter's gradient, or one input's, does not depend on who else wants one."""
    module, inputs = case.build(), case.inputs(requires_grad=True)
    tensors = [*inputs, *module.parameters()]
    expected = results(module, inputs)[-len(tensors) :]
    for chosen, grad in zip(tensors, expected, strict=True):
        for tensor in tensors:
            tensor.requires_grad_(tensor is chosen)
        (alone,) = torch.autograd.grad(loss(call(module, inputs)), [chosen])
        torch.testing.assert_close(alone, grad)
    module.requires_grad_(False)
    inputs = [x.detach() for x in inputs]
    assert not any(output.requires_grad for output in call(module, inputs))


@every_module()
def test_outputs_changed_in_place(case: Case) -> None:
    """The gradients are those of the same operation that is not in place."""
    module, inputs = case.build(torch.float64), case.inputs(torch.float64, requires_grad=True)
    wanted = [*inputs, *module.parameters()]
    expected = torch.autograd.grad(loss(tuple(2 * x for x in call(module, inputs))), wanted)
    outputs = call(module, inputs)
    for output in outputs:
        output.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss(outputs), wanted), expected)


@every_module()
def test_operands_changed_in_place(case: Case) -> None:
    """Backward gives the gradients of the values that forward read, or raises."""
    module, inputs = case.build(), case.inputs()
    for tensor in (*inputs, *module.parameters()):
        wanted = [p for p in module.parameters() if p is not tensor]
        expected = torch.autograd.grad(loss(call(module, inputs)), wanted)
        outputs = call(module, inputs)
        value = tensor.detach().clone()
        with torch.no_grad():
            tensor.add_(1)
        try:
            actual = torch.autograd.grad(loss(outputs), wanted)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:  # as where only a sum reads it
            assert_equal(actual, expected)
        tensor.data.copy_(value)


@every_module()
def test_prune(case: Case) -> None:
    """The masks of torch.nn.utils.prune, which a hook applies before forward, are respected."""
    module, masked, inputs = case.build(), case.build(), case.inputs()
    owners = [(m, name) for m in module.modules() for name, _ in m.named_parameters(recurse=False)]
    masks = []
    for owner, name in owners:
        prune.random_unstructured(owner, name, amount=0.5)
        masks.append(getattr(owner, f"{name}_mask"))
    with torch.no_grad():
        for owner, name in owners:
            getattr(owner, f"{name}_orig").mul_(2)
        for parameter, mask in zip(masked.parameters(), masks, strict=True):
            parameter.mul_(2 * mask)
    assert_equal(call(module, inputs), call(masked, inputs))
    grads = torch.autograd.grad(loss(call(module, inputs)), list(module.parameters()))
    expected = torch.autograd.grad(loss(call(masked, inputs)), list(masked.parameters()))
    assert_equal(grads, tuple(x * mask for x, mask in zip(expected, masks, strict=True)))


@every_module()
def test_parametrize(case: Case) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module, inputs, doubled = case.build(), case.inputs(), case.build()
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    for owner in list(module.modules()):
        for name, _ in list(owner.named_parameters(recurse=False)):
            parametrize.register_parametrization(owner, name, Doubled())
    assert_equal(call(module, inputs), call(doubled, inputs))
    grads = torch.autograd.grad(loss(call(module, inputs)), list(module.parameters()))
    expected = torch.autograd.grad(loss(call(doubled, inputs)), list(doubled.parameters()))
    assert_equal(grads, tuple(2 * grad for grad in expected))


@every_module()
def test_names_of_parameters(case: Case) -> None:
    """One order, everywhere; nothing twice, and no tensor beside the parameters."""
    module = case.build()
    names = [name for name, _ in module.named_parameters()]
    assert (
        names == list(module.state_dict()) == list(dict(copy.deepcopy(module).named_parameters()))
    )
    assert len({id(p) for p in module.parameters()}) == len(names)
    assert not list(module.buffers())
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(2 * vector, module.parameters())
    assert_equal(nn.utils.parameters_to_vector(module.parameters()), 2 * vector)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # MMixer's input is a list
@every_module()
def test_hooks_of_every_module(case: Case) -> None:
    module, inputs = case.build(), case.inputs(requires_grad=True)
    expected = results(module, inputs)
    owners = {name: m for name, m in module.named_modules() if not isinstance(m, nn.ModuleList)}
    seen: list[tuple[str, str]] = []
    for name, owner in owners.items():
        for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
            options = {"with_kwargs": True} if kind.startswith("forward") else {}

            def hook(*_: Any, event: tuple[str, str] = (name, kind)) -> None:
                seen.append(event)

            getattr(owner, f"register_{kind}_hook")(hook, **options)
    assert_equal(results(module, inputs), expected)
    assert sorted(seen) == sorted(
        (name, kind)
        for name in owners
        for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward")
    )


@every_module(where=lambda case: case.kind is not MMixer)
def test_what_hooks_are_given(case: Case) -> None:
    module, inputs = case.build(), case.inputs(requires_grad=True)
    given: dict[str, Any] = {}

    def pre(module: nn.Module, arguments: Any, keywords: Any) -> Any:
        return (2 * arguments[0], *arguments[1:]), keywords

    def backward(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        given["grad_inputs"] = grad_inputs

    expected = results(module, [2 * inputs[0], *inputs[1:]])
    module.register_forward_pre_hook(pre, with_kwargs=True)
    assert_equal(call(module, inputs), tuple(expected[: len(call(module, inputs))]))
    module.register_full_backward_hook(backward)
    grads = torch.autograd.grad(loss(call(module, inputs)), inputs)
    assert_equal(2 * given["grad_inputs"][0], grads[0])


@every_module()
def test_lazy_negation(case: Case) -> None:
    """The memory of each operand holds the value without its sign."""
    function, tensors = function_of_all(case)
    expected = function(*tensors)
    for i, x in enumerate(tensors):
        lazy = [*tensors[:i], torch._neg_view(-x.detach()), *tensors[i + 1 :]]
        assert lazy[i].is_neg()
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                torch.testing.assert_close(function(*lazy), expected)


@every_module(where=lambda case: all(B in s for s in case.shapes.values()))
def test_no_samples(case: Case) -> None:
    module, full = case.build(), call(case.build(), case.inputs())
    inputs = [x.narrow(x.shape.index(B), 0, 0).requires_grad_() for x in case.inputs()]
    outputs = call(module, inputs)
    assert [list(x.shape) for x in outputs] == [
        [0 if size == B else size for size in x.shape] for x in full
    ]
    grads = torch.autograd.grad(loss(outputs), [*inputs, *module.parameters()])
    assert not any(grad.any() for grad in grads)


@every_module()
def test_autocast(case: Case) -> None:
    module, inputs = case.build(), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(module, inputs)
    loss(tuple(x.float() for x in outputs)).backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
    torch.testing.assert_close(
        outputs, call(module, inputs), rtol=0.05, atol=0.05, check_dtype=False
    )


@every_module()
def test_errors(case: Case) -> None:
    """A feature or a dimension too many, another dtype or device, and what is no tensor raise."""
    module, good = case.build(), case.inputs()
    for i, name in enumerate(case.shapes):
        x = good[i]
        wrong = [
            torch.cat([x, x[..., :1]], -1),
            x[None, None],
            x.double(),
            x.to(torch.complex64),
            x.long(),
            x.to("meta"),
            x.numpy(),
            x.tolist(),
            *([] if name == "hx" else [None]),
        ]
        for value, mode in itertools.product(wrong, (torch.enable_grad(), torch.no_grad())):
            with mode, pytest.raises(Exception) as error:  # noqa: PT011
                call(module, [*good[:i], value, *good[i + 1 :]])
            if not isinstance(module, nn.GRU | nn.GRUCell):
                assert error.type in (TypeError, ValueError)
                assert re.search(rf"\b{re.escape(name)}", str(error.value)), error.value
