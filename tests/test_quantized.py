"""int8 weights: `QuantizedMCUCell`, its kernels and its streams."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from mmixer_kernels import (
    CellStream,
    FusedMCU,
    FusedMCUCell,
    FusedMCUStack,
    QuantizedMCUCell,
    quantized,
)
from mmixer_kernels.engines import cpu
from mmixer_kernels.problem import Call, Form

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

OPTIONS = [{}, {"layer_norm": False}, {"mix": "concat"}]
needs_kernels = pytest.mark.skipif(not cpu.state().available, reason="needs the extension")


@pytest.fixture
def each_instruction_set() -> Iterator[list[str]]:
    native = cpu._native
    names = native.build_info()["instruction_sets_here"]
    yield names
    native.use_instruction_set(names[0])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands(batch: int, context_size: int, hidden_size: int) -> list[Tensor | None]:
    context = torch.randn(batch, context_size) if context_size else None
    return [torch.randn(batch, 5), context, torch.randn(batch, hidden_size)]


def by_reference(cell: QuantizedMCUCell, *args: Tensor | None) -> Tensor:
    plain = copy.deepcopy(cell)
    plain.engine = "reference"
    return plain(*args)


def distance_to_ties(monkeypatch: pytest.MonkeyPatch, cell: QuantizedMCUCell, args) -> float:  # type: ignore[no-untyped-def]
    """That of the operands' quotients to the next half, where rounding decides between integers."""
    quantize, distances = quantized.quantize, []

    def looking(x: Tensor) -> tuple[Tensor, Tensor]:
        integers, scale = quantize(x)
        distances.append((0.5 - (x / scale - integers).abs()).min().item())
        return integers, scale

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "quantize", looking)
        by_reference(cell, *args)
    return min(distances)


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("context_size", [0, 7])
@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 1), (3, 9), (40, 8), (1, 130)])
def test_the_kernels_are_the_equations(  # type: ignore[no-untyped-def]
    monkeypatch, each_instruction_set, threads, options, context_size, batch, hidden_size
) -> None:
    """No value is so near to a half that float32's rounding before it could turn it."""
    for seed in range(100):
        torch.manual_seed(seed)
        cell = FusedMCUCell(5, context_size, hidden_size, **options).quantized()
        args = operands(batch, context_size, hidden_size)
        if distance_to_ties(monkeypatch, cell, args) > 5e-5:
            break
    else:
        pytest.fail("every draw has a value near a half")
    expected = by_reference(cell, *args)
    for name, count in product(each_instruction_set, (1, 4)):
        cpu._native.use_instruction_set(name)
        torch.set_num_threads(count)
        torch.testing.assert_close(cell(*args), expected, atol=2e-6, rtol=2e-5)
        stream = CellStream(cell, args[1], args[2])
        torch.testing.assert_close(stream(args[0]), expected, atol=2e-6, rtol=2e-5)
        assert stream._direct._stream is not None


@needs_kernels
def test_build_info_names_the_kernels_in_use(each_instruction_set) -> None:
    kernels = {
        "avx512": {"avx512vnni", "avxvnni", "avx2"},
        "avx2": {"avxvnni", "avx2"},
        "baseline": {"baseline"},
    }
    for name in each_instruction_set:
        cpu._native.use_instruction_set(name)
        assert cpu._native.build_info()["int8_set"] in kernels[name]


def test_a_products_error_is_below_half_a_step_of_each_operand() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(20, 33), torch.randn(17, 33)
    x[3], w[4] = 0, 0
    integers, scale = quantized.quantize(w)
    error = (
        quantized.linear(x, integers.to(torch.int8), scale.squeeze(1)) - x.double() @ w.double().T
    )
    step_x, step_w = x.abs().amax(1, True) / 127, w.abs().amax(1, True) / 127
    bound = (
        step_w.T / 2 * x.abs().sum(1, True)
        + step_x / 2 * w.abs().sum(1)
        + 33 / 4 * (step_x * step_w.T)
    )
    assert (error.abs() <= bound * (1 + 1e-5) + 1e-6).all()
    assert error.abs().max() > 0.01 * bound.max()  # The bound is one of this error.


@pytest.mark.parametrize("context_size", [0, 7])
@pytest.mark.parametrize("mix", ["gated", "concat"])
def test_a_cells_error_is_that_of_its_products(mix: str, context_size: int) -> None:
    """Without LayerNorm, whose factor is 1 / deviation, each gate passes its products' errors on,
    tanh at most once and sigmoid a quarter of them."""
    torch.manual_seed(0)
    cell = FusedMCUCell(5, context_size, 33, layer_norm=False, mix=mix)
    f, g, h = operands(6, context_size, 33)
    w = cell.weights().map(lambda x: x.detach())

    def bound(x: Tensor, error: Tensor | float, weight: Tensor) -> Tensor:
        """The error of a product, of that of its operand."""
        largest = (x.abs() + error).amax(1, True)
        step_x, step_w = largest / 254, weight.abs().amax(1) / 254
        error = error + step_x  # of the quantised operand
        return error.expand_as(x) @ weight.abs().T + step_w * (x.abs() + error).sum(1, True)

    with torch.no_grad():
        x, of_x = (f @ w.weight_f.T).tanh(), bound(f, 0.0, w.weight_f)
        if g is not None:
            g_bar, of_g = (g @ w.weight_g.T).tanh(), bound(g, 0.0, w.weight_g)
            of_s = bound(x, of_x, w.weight_s[:, :33]) + bound(g_bar, of_g, w.weight_s[:, 33:])
            mixed = torch.cat([x, g_bar], 1) @ w.weight_s.T
            s = mixed.sigmoid()
            if mix == "gated":
                of_x = of_x + of_g + of_s / 4 * ((x - g_bar).abs() + of_x + of_g)
                x = s * x + (1 - s) * g_bar
            else:
                x, of_x = mixed, of_s
        r = ((x + h) @ w.weight_r.T).sigmoid()
        of_r, of_z = bound(x + h, of_x, w.weight_r) / 4, bound(x + h, of_x, w.weight_z) / 4
        v, of_v = r * h + x, of_r * h.abs() + of_x
        n, of_n = (v @ w.weight_h.T).tanh(), bound(v, of_v, w.weight_h)
        error = (cell.quantized()(f, g, h) - cell(f, g, h)).abs()
    assert (error <= of_n + of_z * ((n - h).abs() + of_n) + 1e-6).all()
    assert error.max() > 1e-4


@needs_kernels
def test_a_result_depends_on_its_sample_alone(threads: None) -> None:
    cell = FusedMCUCell(5, 7, 200).quantized()
    args = operands(70, 7, 200)
    torch.set_num_threads(1)
    expected = cell(*args)
    assert torch.equal(
        torch.cat([cell(*(x[i : i + 1] for x in args)) for i in range(70)]), expected
    )
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cell(*args), expected)
    spread = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in args]
    assert torch.equal(cell(*spread), expected)
    by_columns = [x.T.contiguous().T for x in args]
    assert torch.equal(cell(*by_columns), expected)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("context_size", [0, 7])
def test_a_stream_is_the_cell_step_by_step(engine: str, context_size: int) -> None:
    cell = FusedMCUCell(5, context_size, 33, engine=engine).quantized()
    _, context, hx = operands(2, context_size, 33)
    stream = CellStream(cell, context, hx)
    frames = torch.randn(6, 2, 5)
    for t, frame in enumerate(frames):
        if t == 3:  # Other weights are seen.
            cell.load_state_dict(FusedMCUCell(5, context_size, 33).quantized().state_dict())
        hx = cell(frame, context, hx)
        assert torch.equal(stream(frame), hx)
    stream.reset()
    assert torch.equal(stream(frames[0]), cell(frames[0], context))


def test_a_stream_follows_the_float32_cells() -> None:
    """It does not drift: errors stay those of a step."""
    torch.manual_seed(0)
    cell = FusedMCUCell(16, 8, 64)
    context = torch.randn(1, 8)
    both = CellStream(cell, context), CellStream(cell.quantized(), context)
    errors = torch.stack([(both[0](x) - both[1](x)).abs().max() for x in torch.randn(200, 1, 16)])
    assert 1e-4 < errors.max() < 0.05


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("context_size", [0, 7])
def test_state_dicts_and_copies(options: dict[str, object], context_size: int) -> None:
    unit = FusedMCU(5, context_size, 9, **options)
    cell = unit.quantized()
    args = operands(2, context_size, 9)
    expected = cell(*args)
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    other = FusedMCUCell(5, context_size, 9, **options).quantized()
    other.load_state_dict(torch.load(file))
    for same in (other, pickle.loads(pickle.dumps(cell)), copy.deepcopy(cell), cell.to("cpu")):
        assert torch.equal(same(*args), expected)
    dtypes = {name: x.dtype for name, x in cell.state_dict().items()}
    assert dtypes.pop("scale") == torch.float32
    assert {n for n, dtype in dtypes.items() if dtype == torch.int8} == {
        name for name, _ in unit.named_parameters() if name.startswith("weight")
    }
    assert not list(cell.parameters())
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
    assert torch.equal(cell(*args), expected)  # It has weights of its own.


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_float_state_dict_is_refused_and_changes_nothing(assign: bool, strict: bool) -> None:
    unit = FusedMCUCell(5, 7, 9)
    cell = unit.quantized()
    holder = torch.nn.ModuleDict({"cell": cell})
    before = {name: x.clone() for name, x in cell.state_dict().items()}
    own = {f"cell.{name}": x for name, x in unit.state_dict().items()}
    floats = {name: x for name, x in before.items() if name == "scale"}
    for state in (own, own | {f"cell.{name}": x + 1 for name, x in floats.items()}):
        words = r"cell\.weight_f must be torch\.int8, but is torch\.float32(.|\n)*quantise that"
        with pytest.raises(RuntimeError, match=words):
            holder.load_state_dict(state, strict=strict, assign=assign)
        assert all(torch.equal(x, before[name]) for name, x in cell.state_dict().items())


def test_a_buffer_beside_its_own_and_one_that_is_computed() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, scale: Tensor) -> Tensor:
            return 2 * scale

    cell, doubled = (FusedMCUCell(5, 7, 9).quantized() for _ in range(2))
    doubled.load_state_dict(cell.state_dict())
    args = operands(2, 7, 9)
    expected = cell(*args)
    cell.register_buffer("calls", torch.zeros(()))
    assert torch.equal(cell(*args), expected)
    doubled.scale.mul_(2)
    parametrize.register_parametrization(cell, "scale", Doubled())
    stream = CellStream(cell, args[1], args[2])
    assert torch.equal(stream(args[0]), doubled(*args))
    assert torch.equal(cell(*args), doubled(*args))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own use
def test_scripting_is_refused_as_the_units_is() -> None:
    words = r"QuantizedMCUCell cannot be scripted: use torch\.jit\.trace"
    with pytest.raises(TypeError, match=words):
        torch.jit.script(FusedMCUCell(5, 7, 9).quantized())


def test_what_looks_on_gets_the_equations() -> None:
    cell = FusedMCUCell(5, 7, 9).quantized()
    args = operands(3, 7, 9)
    expected = by_reference(cell, *args)
    torch.testing.assert_close(torch.export.export(cell, tuple(args)).module()(*args), expected)
    torch.testing.assert_close(torch.vmap(cell)(*(x[:, None] for x in args))[:, 0], expected)
    torch.testing.assert_close(cell(*(x[0] for x in args)), expected[0])
    with torch.autocast("cpu"):
        torch.testing.assert_close(cell(*args), expected)


def test_repr_and_other_dtypes() -> None:
    cell = FusedMCUCell(5, 7, 9, mix="concat", engine="reference").quantized()
    text = "QuantizedMCUCell(5, 7, 9, weights=int8, mix='concat', engine='reference')"
    assert repr(cell) == text
    for convert in (cell.half, cell.bfloat16, cell.double):
        with pytest.raises(TypeError, match=r"cannot become torch\..*: convert the cell that"):
            convert()
    assert cell.scale.dtype == torch.float32
    narrow = FusedMCUCell(5, 7, 9).bfloat16().quantized()
    assert narrow.norm_weight.dtype == narrow.scale.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own use
def test_wrong_arguments() -> None:
    cell = FusedMCUCell(5, 7, 9).quantized()
    f, g, h = operands(2, 7, 9)
    for place, name in enumerate(("input", "context", "hx")):
        args = [f, g, h]
        args[place] = args[place].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            cell(*args)
        with torch.no_grad():
            cell(*args)
        args[place] = args[place].detach().bfloat16()
        with pytest.raises(TypeError, match=f"{name} must be float32 .* is bfloat16"):
            cell(*args)
    with pytest.raises(ValueError, match="hx must not require a gradient"):
        torch.func.jvp(lambda x: cell(f, g, x), (h,), (h,))
    for error, words, args in (
        (ValueError, r"context must be \[B, context_size\]", (f, g[0], h)),
        (ValueError, "input must have 5 features", (f[:, :4], g, h)),
        (ValueError, r"hx must have shape \[2, 9\]", (f, g, h[:1])),
        (TypeError, "context must be a Tensor, but is a NoneType", (f,)),
        (TypeError, "input must be a Tensor", ([1.0], g)),
        (ValueError, "input must be", (f[None], g, h)),
    ):
        with pytest.raises(error, match=words):
            cell(*args)
    cell.engine = "triton"
    with pytest.raises((ValueError, RuntimeError), match="triton"):
        cell(f, g, h)
    with pytest.raises(TypeError, match=r"unit must be a FusedMCUCell.* is a FusedMCUStack"):
        QuantizedMCUCell(FusedMCUStack(5, 7, 9))  # type: ignore[arg-type]
    wrong = FusedMCUCell(5, 7, 9)
    with torch.no_grad():
        wrong.weight_z[3, 3] = torch.nan
    with pytest.raises(ValueError, match="weight_z must be finite in float32"):
        wrong.quantized()
    with pytest.raises(ValueError, match=r"at most 132104 .* one is 132105"):
        FusedMCUCell(132105, 0, 1).quantized()


@needs_kernels
def test_the_engine_takes_int8_weights_for_a_step_alone() -> None:
    cell = FusedMCUCell(5, 7, 9).quantized()
    own = cell.weights().tensors()
    form = Form(1, len(own), True, False, False, "gated", 1e-5)
    f, g, _ = operands(2, 7, 9)
    cpu.run_forward(Call(form, "nothing", "step"), [f, g, *own])
    with pytest.raises(ValueError, match="weight_dtype can be int8 for a single float32 step"):
        cpu.run_forward(Call(form, "nothing", "sequence"), [f.expand(3, 2, 5), g, *own])
    with pytest.raises(ValueError, match="weight_dtype can be int8 for a single float32 step"):
        cpu.run_forward(Call(form, "states", "step"), [f, g, *own])
    with pytest.raises((TypeError, ValueError)):
        cpu.run_forward(Call(form, "nothing", "step"), [f.double(), g.double(), *own])
    bare = own[:6] + own[7:]
    with pytest.raises(ValueError, match="weight set must have six"):
        cpu.run_forward(Call(form._replace(weights=8), "nothing", "step"), [f, g, *bare])
