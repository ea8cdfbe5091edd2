"""Modules with a unit inside as ONNX files: onnxruntime against float64, at sizes of its own."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmixer_kernels import FusedMCU, FusedMCUCell, FusedMCUStack, MMixer, functional

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# torch's exporter warns of itself.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

INPUTS, CONTEXTS, HIDDEN, STEPS, BATCH = (5, 4, 6), (3, 2, 1), 7, 4, 2
OTHER_SIZES = ((6, 5), (1, 1), (9, 2))
EXACT_EPS = 2.0**-17  # ONNX writes numbers in float32.
MARGIN = 8
"""How many times the error of PyTorch in the same dtype is allowed: operations are merged."""


class Around(nn.Module):
    """A user's module: `function` takes the units and the inputs, all tensors of one dtype."""

    def __init__(self, function: Callable[..., Any], *units: nn.Module) -> None:
        super().__init__()
        self.units, self.function = nn.ModuleList(units), function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.units, *inputs)


def units(**options: Any) -> list[FusedMCU]:
    sizes = zip(INPUTS, CONTEXTS, strict=True)
    return [FusedMCU(size, context, HIDDEN, **options) for size, context in sizes]


def unit(**options: Any) -> Around:
    def after_a_linear(modules: Any, x: Tensor, c: Tensor, hx: Tensor, lengths: Tensor) -> Any:
        output, h_n = modules[0](modules[1](x), c, hx, lengths)
        return output * 2, h_n

    size = INPUTS[0]
    return Around(after_a_linear, units(**options)[0], nn.Linear(size, size))


def group(mix: str = "gated", layer_norm: bool = True) -> Around:
    def call(modules: Any, *inputs: Tensor) -> Any:
        weights = [module.weights() for module in modules]
        return functional.mcu_group(
            inputs[:3], inputs[3:6], weights, *inputs[6:], mix=mix, engine=modules[0].engine
        )

    return Around(call, *units(mix=mix, layer_norm=layer_norm))


def without_options() -> Around:
    return Around(lambda modules, x, c: modules[0](x, c), *units())


def bare(**options: Any) -> Around:
    """A unit without context, whose first state stands in the context's place."""
    size = INPUTS[0]
    return Around(
        lambda modules, *inputs: modules[0](*inputs), FusedMCU(size, 0, HIDDEN, **options)
    )


def stack(context_size: int, **options: Any) -> Around:
    """Two layers in both directions."""

    def call(modules: Any, x: Tensor, hx: Tensor, lengths: Tensor, *context: Tensor) -> Any:
        return modules[0](x, *(context or [None]), hx, lengths)

    options = {"num_layers": 2, "bidirectional": True, **options}
    return Around(call, FusedMCUStack(INPUTS[0], context_size, HIDDEN, **options))


def mixer(**options: Any) -> Around:
    def call(modules: Any, *inputs: Tensor) -> Tensor:
        return modules[0](inputs[:3], *inputs[3:])

    network = MMixer(INPUTS, 4, hidden_size=HIDDEN, batch_first=False, **options)
    return Around(call, network)


SHAPES: dict[str, tuple[str | int, ...]] = {
    **{name: ("time", "batch", size) for name, size in zip("xyz", INPUTS, strict=True)},
    **{name: ("batch", size) for name, size in zip("cde", CONTEXTS, strict=True)},
    "X": ("batch", "time", INPUTS[0]),
    "u": ("time", INPUTS[0]),
    "f": ("batch", INPUTS[0]),
    "C": (CONTEXTS[0],),
    "h": (1, "batch", HIDDEN),
    "s": ("batch", HIDDEN),
    "G": (3, "batch", HIDDEN),
    "S": (4, "batch", HIDDEN),
    "n": ("batch",),
}
"""Shapes of inputs by a letter: x, y, z sequences, X one with the batch first, u one without a
batch, f a step; c, d, e contexts, C one without a batch; h a unit's state, s a cell's, G a group's,
S a stack's; n lengths."""


def draw(names: str, steps: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    sizes = {"time": steps, "batch": batch}
    return tuple(
        torch.randint(1, steps + 1, (batch,))
        if name == "n"
        else torch.randn([sizes.get(size, size) for size in SHAPES[name]], dtype=dtype)
        for name in names
    )


def free(names: str, which: tuple[str, ...] = ("time", "batch")) -> tuple[dict[int, Any], ...]:
    """The dimensions that an export leaves free."""
    dims = {name: torch.export.Dim(name) for name in which}
    return tuple(
        {i: dims[size] for i, size in enumerate(SHAPES[name]) if size in dims} for name in names
    )


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def run(content: bytes, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    named = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, named)]


def operators(written: Any) -> Counter[str]:
    return Counter(node.op_type for node in written.model.graph)


def assert_as_exact(content: bytes, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """onnxruntime's error against float64 is no more than MARGIN times PyTorch's."""
    dtype = next(module.parameters()).dtype
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if hasattr(part, "engine"):
            part.engine = "reference"
    with torch.no_grad():
        truths = tensors(exact(*(x.double() if x.is_floating_point() else x for x in inputs)))
        eager = tensors(module(*inputs))
    for got, own, truth in zip(run(content, inputs), eager, truths, strict=True):
        assert got.dtype == dtype
        assert got.shape == truth.shape
        last_bit = torch.finfo(dtype).eps * truth.abs().max().item()
        rounding = max((own.double() - truth).abs().max().item(), last_bit)
        assert (got.double() - truth).abs().max().item() <= MARGIN * rounding


CASES = {
    "hx and lengths": (unit, "xchn"),
    "concat": (lambda: unit(mix="concat"), "xchn"),
    "no layer norm": (lambda: unit(layer_norm=False), "xchn"),
    "batch first": (lambda: unit(batch_first=True), "Xchn"),
    "float64": (lambda: unit(eps=EXACT_EPS).double(), "xchn"),
    "recompute": (lambda: unit(recompute=True), "xchn"),
    "neither": (without_options, "xc"),
    "unbatched": (without_options, "uC"),
    "cell": (lambda: FusedMCUCell(INPUTS[0], CONTEXTS[0], HIDDEN), "fcs"),
    "group": (group, "xyzcdeGn"),
    "group of another kind": (lambda: group("concat", False), "xyzcde"),
    "without context": (bare, "xh"),
    "cell without context": (lambda: FusedMCUCell(INPUTS[0], 0, HIDDEN), "fs"),
    "stack": (lambda: stack(CONTEXTS[0]), "xSnc"),
    "stack without context": (lambda: stack(0, batch_first=True, layer_norm=False), "XSn"),
    "network": (mixer, "xyz"),
    "network with lengths": (lambda: mixer(summarizer="max", content="self"), "xyzn"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_exported_for_any_batch_and_time(case: str) -> None:
    make, names = CASES[case]
    module = make().eval()
    dtype = next(module.parameters()).dtype
    example = draw(names, STEPS, BATCH, dtype)
    shapes: Any = free(names) if isinstance(module, FusedMCUCell) else (free(names),)
    written = torch.onnx.export(module, example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    scans = sum(name in names for name in "xyzXu") * (4 if "S" in names else 1)
    assert operators(written)["Scan"] == scans
    content = written.model_proto.SerializeToString()
    for steps, batch in OTHER_SIZES:
        assert_as_exact(content, module, draw(names, steps, batch, dtype))


@pytest.mark.parametrize("make", [without_options, lambda: nn.GRU(INPUTS[0], HIDDEN)])
def test_a_fixed_time_as_of_pytorchs_gru(make: Callable[[], nn.Module]) -> None:
    """An export may fix all of the example's sizes, or the time only, as nn.GRU has to."""
    module = make().eval()
    names = "x" if isinstance(module, nn.GRU) else "xc"
    shapes = free(names, ("batch",))
    for given in (None, shapes if isinstance(module, nn.GRU) else (shapes,)):
        example = draw(names, STEPS, BATCH, torch.float32)
        written = torch.onnx.export(
            module, example, dynamic_shapes=given, dynamo=True, verbose=False
        )
        content = written.model_proto.SerializeToString()
        for batch in (BATCH,) if given is None else (1, 3):
            assert_as_exact(content, module, draw(names, STEPS, batch, torch.float32))


@pytest.mark.parametrize(("make", "names"), [(unit, "xchn"), (lambda: stack(0), "xSn")])
def test_a_program_of_torch_export_that_was_saved(
    make: Callable[[], nn.Module], names: str
) -> None:
    module = make().eval()
    example = draw(names, STEPS, BATCH, torch.float32)
    program = torch.export.export(module, example, dynamic_shapes=(free(names),))
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    assert "mmixer_kernels.mcu_forward" in str(loaded.graph)  # torch.export keeps the fused op.
    content = torch.onnx.export(loaded, dynamo=True, verbose=False).model_proto.SerializeToString()
    for steps, batch in OTHER_SIZES:
        assert_as_exact(content, module, draw(names, steps, batch, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_dtype_carries_a_float32_state(dtype: torch.dtype) -> None:
    def call(modules: Any, x: Tensor, c: Tensor) -> Tensor:
        return modules[0](x.to(dtype), c.to(dtype))[0].float()

    module = Around(call, units()[0].to(dtype))
    example = draw("xc", STEPS, BATCH, torch.float32)
    written = torch.onnx.export(
        module, example, dynamic_shapes=(free("xc"),), dynamo=True, verbose=False
    )
    inputs = draw("xc", 100, 3, torch.float32)
    (got,) = run(written.model_proto.SerializeToString(), inputs)
    with torch.no_grad():
        expected = module(*inputs)
    # The same states in float32: what differs is the last bit of what is given.
    assert (got - expected).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("make", "names"), [(unit, "xchn"), (group, "xyzcdeGn"), (lambda: stack(0), "xSn")]
)
def test_the_former_exporter_gives_the_traced_time_or_an_error(
    make: Callable[[], nn.Module], names: str
) -> None:
    """It writes the steps out; a file of other sizes must not give a wrong result."""
    module = make().eval()
    labels = [f"input_{name}" for name in names]
    axes = {
        label: {i: dim.__name__ for i, dim in dims.items()}
        for label, dims in zip(labels, free(names), strict=True)
    }
    for steps in (1, STEPS):
        file = io.BytesIO()
        example = draw(names, steps, BATCH, torch.float32)
        torch.onnx.export(
            module, example, file, dynamo=False, input_names=labels, dynamic_axes=axes
        )
        for batch in (1, 3):
            inputs = draw(names, steps, batch, torch.float32)
            assert_as_exact(file.getvalue(), module, inputs)
        for other in (2, 3, 6):
            with pytest.raises(Exception, match=r"Split|Squeeze|split"):
                run(file.getvalue(), draw(names, other, BATCH, torch.float32))
