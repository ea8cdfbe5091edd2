"""The CUDA engine on a GPU, beside the float64 reference on the CPU and eager PyTorch on the GPU.

`benchmarks/on_gpu.sh` runs it, a process for each path, so that one that hangs hides no other.
tests/engines/test_cuda.py runs the same kernels without a GPU.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import contract
import helpers
import pytest
import torch
from contract import Contract, Precision, Results, compare, eager, equal
from helpers import (
    Problem,
    Size,
    op_operands,
    problem,
    reference_results,
    relative_errors,
    with_gradients,
)
from torch import Tensor, nn

from mmixer_kernels import (
    CellStream,
    FusedMCU,
    FusedMCUCell,
    FusedMCUStack,
    MMixer,
    engines,
    reference,
)
from mmixer_kernels.engines import cuda
from mmixer_kernels.functional import mcu
from mmixer_kernels.reference import Weights

STATE = engines()["cuda"]

DEVICE = "cuda"
PATHS = ("cluster", "cooperative", "step")
run = partial(helpers.run, "cuda")


PRECISIONS = {
    "float64": Precision(torch.float64, "highest", 1e-13),
    "float32": Precision(torch.float32, "highest", 2e-6),
    # cuBLAS takes TF32 (2^-11) for some sizes and float32 for others; eager PyTorch's sizes differ.
    "float32-high": Precision(torch.float32, "high", 1e-3),
    "bfloat16": Precision(torch.bfloat16, "highest", 2.0**-8),
    "float16": Precision(torch.float16, "highest", 2.0**-11),
}
# T, B, input, context, H: each odd or aligned, alone and with others; without context in both
# directions.
SIZES = [
    Size(1, 1, 1, 1, 1),
    Size(3, 5, 7, 9, 1),
    Size(64, 5, 24, 16, 33),
    Size(3, 13, 40, 33, 128),
    Size(64, 8, 128, 128, 128),
    Size(3, 33, 96, 64, 256),
    Size(64, 1, 256, 256, 256),
    Size(3, 5, 60, 20, 500),
    Size(1, 8, 512, 512, 512),
    Size(3, 13, 64, 48, 512),
    Size(7, 13, 64, 0, 512),
    Size(3, 13, 96, 64, 768),
    Size(3, 8, 64, 64, 1024),
]


def sizes(size: Size) -> str:
    return "x".join(map(str, size))


COMBINATIONS = [
    (path, precision)
    for precision in PRECISIONS
    for path in PATHS
    if path == "step" or precision != "float64"
]
every_combination = pytest.mark.parametrize(
    ("path", "precision"), COMBINATIONS, ids=["-".join(pair) for pair in COMBINATIONS]
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The precision is restored and the GPU waited for, so that a fault shows in the test that
    made it."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.cuda.synchronize()


Take = Callable[..., Precision]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Take:
    """take(path, precision, *hidden_sizes): all that follows takes that path in that precision.

    Skips the test where the path has no kernel for one of the sizes.
    """

    def choose(path: str, precision: str, *hidden_sizes: int) -> Precision:
        chosen = PRECISIONS[precision]
        torch.set_float32_matmul_precision(chosen.matmul)
        skip_without_kernel(path, chosen.dtype, hidden_sizes)
        monkeypatch.setattr(cuda, "PATHS", (path,))
        return chosen

    return choose


def skip_without_kernel(path: str, dtype: torch.dtype, hidden_sizes: Iterable[int]) -> None:
    for hidden in hidden_sizes if path != "step" else ():
        for backward in (False, True):
            plans, refusal = cuda.persistent_plans(0, path, hidden, dtype, backward)
            if not plans:
                which = "backward" if backward else "forward"
                pytest.skip(f"{path}, {which}, H = {hidden}, {dtype}: {refusal}")


class TestContract(Contract):
    ENGINE, DEVICE = "cuda", DEVICE
    PRECISIONS = contract.PRECISIONS | {"float32-high": PRECISIONS["float32-high"]}
    PAIRS = COMBINATIONS
    OTHERS = (
        ("step", "float64"),
        *((path, precision) for path in PATHS for precision in ("float32", "bfloat16")),
    )
    SIZES = (Size(1, 1, 1, 1, 1), Size(7, 13, 17, 5, 45), Size(5, 9, 32, 32, 256))
    LARGE = Size(64, 8, 512, 512, 512)

    @contextmanager
    def entered(self, way: str, precision: Precision) -> Iterator[None]:
        sizes = (*self.SIZES, self.SIZE, self.LARGE)
        skip_without_kernel(way, precision.dtype, {size.hidden for size in sizes})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "PATHS", (way,))
            yield


def of_form(size: Size, dtype: torch.dtype, lengths: bool = True) -> Problem:
    """A problem: one direction with context, both without."""
    return problem(size, lengths=lengths, bidirectional=size.context == 0, dtype=dtype)


def on_both(size: Size, dtype: torch.dtype, lengths: bool = True) -> tuple[Problem, Results]:
    """`of_form` on the GPU, and its float64 results on the CPU."""
    p = of_form(size, dtype, lengths)
    return p.on(DEVICE), reference_results(p)


def check(p: Problem, truth: Results, precision: Precision) -> None:
    theirs = with_gradients(eager(DEVICE, precision.dtype), p)
    compare(with_gradients(run(), p), theirs, truth, precision.floor)


def check_teams(
    p: Problem, truth: Results, chosen: Precision, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks teams of 4 samples and of 8."""
    for samples in ("4", "8") if path != "step" else ("8",):
        monkeypatch.setattr(cuda, "SAMPLES", (samples,))
        check(p, truth, chosen)


@every_combination
def test_small(take: Take, path: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """compute-sanitizer watches these sizes too: few steps, a padded H, a padded tile of
    samples."""
    for size in (Size(2, 9, 7, 5, 33), Size(2, 9, 7, 0, 33), Size(3, 3, 16, 16, 128)):
        chosen = take(path, precision, size.hidden)
        p, truth = on_both(size, chosen.dtype)
        check_teams(p, truth, chosen, path, monkeypatch)


@pytest.mark.parametrize("size", SIZES, ids=sizes)
@every_combination
def test_error(
    take: Take, path: str, precision: str, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = take(path, precision, size.hidden)
    p, truth = on_both(size, chosen.dtype, lengths=False)
    check_teams(p, truth, chosen, path, monkeypatch)


@pytest.mark.parametrize("hidden", [33, 200, 512])
def test_packets_of_16_bytes(take: Take, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = take("wide", "bfloat16", hidden)
    p, truth = on_both(Size(7, 13, 24, 16, hidden), chosen.dtype)
    check_teams(p, truth, chosen, "wide", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["cuda", "triton"])
@pytest.mark.parametrize(("batch", "context_size"), [(1, 24), (17, 24), (70, 24), (1, 0), (17, 0)])
def test_cell_and_its_stream(
    engine: str, batch: int, context_size: int, dtype: torch.dtype
) -> None:
    """A step is one launch, and in a graph; other calls of the same workspace come between."""
    if not engines()[engine].available:
        pytest.skip(engines()[engine].reason)
    cell = FusedMCUCell(33, context_size, 45, engine=engine, device=DEVICE, dtype=dtype)
    x = torch.randn(5, batch, 33, device=DEVICE, dtype=dtype)
    c = torch.randn(batch, context_size, device=DEVICE, dtype=dtype) if context_size else None
    hx = torch.randn(batch, 45, device=DEVICE, dtype=dtype)
    stream, state = CellStream(cell, c, hx), hx
    with torch.no_grad():
        for t in range(5):
            truth, _ = reference.mcu(
                x[t : t + 1].double(), None if c is None else c.double(),
                cell.weights().map(torch.Tensor.double), state.double(),
            )  # fmt: skip
            state = cell(x[t], c, state)
            error = (state - truth[0]).norm() / truth.norm()
            assert error < 16 * torch.finfo(dtype).eps
            cell(x[0, :1], None if c is None else c[:1])
            assert torch.equal(stream(x[t]), state)


@pytest.mark.parametrize("engine", ["cuda", "triton"])
@pytest.mark.parametrize("context_size", [0, 24])
def test_a_stack_and_its_stream(engine: str, context_size: int) -> None:
    """All layers are in one graph."""
    if not engines()[engine].available:
        pytest.skip(engines()[engine].reason)
    stack = FusedMCUStack(33, context_size, 45, 2, engine=engine, device=DEVICE)
    x, hx = torch.randn(5, 3, 33, device=DEVICE), torch.randn(2, 3, 45, device=DEVICE)
    context = torch.randn(3, context_size, device=DEVICE) if context_size else None
    output, h_n = stack(x, context, hx)
    stream = CellStream(stack, context, hx)
    states = torch.stack([stream(frame).clone() for frame in x])
    torch.testing.assert_close(states, output.detach())
    torch.testing.assert_close(stream.state, h_n.detach())


@pytest.mark.parametrize(
    ("mix", "layer_norm", "lengths"),
    [("gated", True, True), ("gated", False, False), ("concat", True, True)],
)
def test_gradcheck(mix: str, layer_norm: bool, lengths: bool) -> None:
    p = problem(Size(2, 2, 2, 3, 3), layer_norm=layer_norm, lengths=lengths).on(DEVICE)
    tensors = [x.requires_grad_() for x in p.operands().values()]

    def function(input: Tensor, context: Tensor, hx: Tensor, *weights: Tensor) -> Any:
        return mcu(input, context, Weights(*weights), hx[None], p.lengths, mix=mix, engine="cuda")

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"hx": False, "lengths": False},
        {"layer_norm": False, "lengths": False},
        {"groups": 2, "context": False, "bidirectional": True},
    ],
)
def test_opcheck(options: dict[str, Any]) -> None:
    arguments, grads = op_operands(**options, device=DEVICE)
    forward = torch.ops.mmixer_kernels.mcu_forward.default
    backward = torch.ops.mmixer_kernels.mcu_backward.default
    options = "cuda", "gates"
    torch.library.opcheck(forward, (*arguments, *options))
    _, _, saved = forward(*arguments, *options)
    grads = [grad.requires_grad_() for grad in grads]
    call = (*grads, saved.detach(), *arguments, *options, True, True)
    torch.library.opcheck(backward, call)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    unit = FusedMCU(3, 4, 45, engine="cuda", device=DEVICE)
    compiled = torch.compile(unit, fullgraph=True, backend=backend)
    x = torch.randn(6, 2, 3, device=DEVICE, requires_grad=True)
    c, lengths = torch.randn(2, 4, device=DEVICE), torch.tensor([6, 3], device=DEVICE)
    grads = []
    for function in (unit, compiled):
        output, h_n = function(x, c, None, lengths)
        tensors = [x, *unit.parameters()]
        grads.append(torch.autograd.grad(output.square().sum() + h_n.sum(), tensors))
    for plain, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize(
    "size",
    [Size(40, 13, 64, 48, 512), Size(17, 33, 40, 33, 250), Size(17, 17, 40, 0, 250)],
    ids=sizes,
)
@every_combination
def test_50_runs_are_bit_equal(take: Take, path: str, precision: str, size: Size) -> None:
    chosen = take(path, precision, size.hidden)
    p = of_form(size, chosen.dtype).on(DEVICE)
    expected = with_gradients(run(), p)
    assert all(x.isfinite().all() for x in expected.values())
    for _ in range(49):
        equal(with_gradients(run(), p), expected)


def forward_alone(p: Problem) -> Results:
    weights = p.weights if p.weights_reverse is None else (p.weights, p.weights_reverse)
    with torch.no_grad():
        output, h_n = run()(p.input, p.context, weights, p.hx, p.lengths)
    return {"output": output, "h_n": h_n}


FORMS = pytest.mark.parametrize(
    "context", [33, 0], ids=["one direction", "both directions without context"]
)


CALLS: dict[str, Callable[[Problem], Results]] = {
    "forward": forward_alone,
    "forward+backward": partial(with_gradients, run()),
}


@pytest.mark.parametrize("call", CALLS)
@FORMS
@every_combination
def test_graph(take: Take, path: str, precision: str, context: int, call: str) -> None:
    """A captured call gives the eager call's bits, also for operands that changed after it."""
    chosen = take(path, precision, 250)
    p = of_form(Size(9, 13, 40, context, 250), chosen.dtype).on(DEVICE)
    function = CALLS[call]
    values = [p.input.clone(), torch.randn_like(p.input)]
    expected = []
    for value in values:
        p.input.copy_(value)
        expected.append({name: x.clone() for name, x in function(p).items()})

    _warm_up(lambda: function(p))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(p)
    for value, answer in [*zip(values, expected, strict=True)] * 2:
        p.input.copy_(value)
        for x in results.values():
            x.fill_(torch.nan)
        graph.replay()
        equal(results, answer)


@pytest.mark.parametrize("path", PATHS)
def test_a_shape_that_is_first_seen_inside_a_capture(take: Take, path: str) -> None:
    """Then its products are first looked for there; other shapes have loaded the kernels."""
    chosen = take(path, "bfloat16", 250)
    known = problem(Size(9, 13, 40, 33, 250), lengths=True, dtype=chosen.dtype).on(DEVICE)
    p = problem(Size(7, 11, 56, 35, 250), lengths=True, dtype=chosen.dtype).on(DEVICE)
    function = CALLS["forward+backward"]
    _warm_up(lambda: function(known))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(p)
    for x in results.values():
        x.fill_(torch.nan)
    graph.replay()
    equal(results, function(p))


def _warm_up(call: Callable[[], object]) -> None:
    """Two calls on a side stream, as torch's notes on graphs have it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)


class Trained(NamedTuple):
    """A module, and what it is called with: inputs of which all have gradients."""

    module: nn.Module
    arguments: tuple[Any, ...]
    inputs: list[Tensor]

    @classmethod
    def make(cls, name: str) -> Trained:
        """A unit alone, a stack of them without context, or the network of two modalities."""
        if name == "FusedMCUStack":
            stack = FusedMCUStack(40, 0, 128, 2, bidirectional=True, engine="cuda", device=DEVICE)
            inputs = [torch.randn(9, 5, 40, device=DEVICE).requires_grad_()]
            return cls(stack, (*inputs,), inputs)
        if name == "FusedMCU":
            unit = FusedMCU(40, 24, 128, engine="cuda", device=DEVICE)
            inputs = [
                torch.randn(*s, device=DEVICE).requires_grad_() for s in ((9, 5, 40), (5, 24))
            ]
            return cls(unit, (*inputs,), inputs)
        network = MMixer([40, 24], 10, hidden_size=128, engine="cuda", device=DEVICE)
        features = [torch.randn(5, 9, n, device=DEVICE).requires_grad_() for n in (40, 24)]
        return cls(network, (features,), features)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return self._outputs(self.module)

    def backward(self, module: Callable[..., Any] | None = None) -> list[Tensor]:
        """The outputs and all gradients; of another form of the module, if one is given."""
        outputs = self._outputs(self.module if module is None else module)
        leaves = [*self.inputs, *self.module.parameters()]
        grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)
        return [x.detach().clone() for x in outputs] + [x.clone() for x in grads]

    def change(self) -> None:
        for x in self.inputs:
            x.detach().normal_()

    def _outputs(self, module: Callable[..., Any]) -> list[Tensor]:
        outputs = module(*self.arguments)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", ["FusedMCU", "FusedMCUStack", "MMixer"])
def test_graph_of_a_module(name: str, passes: str) -> None:
    """A captured call gives the eager call's results, also for inputs that changed after it."""
    trained = Trained.make(name)
    call = getattr(trained, passes)
    _warm_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        trained.change()
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(results, call())


def test_graphed_callables_of_a_network() -> None:
    """They train: each replayed backward gives the eager one's gradients."""
    trained = Trained.make("MMixer")
    eager = copy.deepcopy(trained.module)
    graphed = torch.cuda.make_graphed_callables(trained.module, trained.arguments)
    for _ in range(3):
        trained.change()
        expected = trained._replace(module=eager).backward()
        torch.testing.assert_close(trained.backward(graphed), expected)
        with torch.no_grad():
            for ours, other in zip(trained.module.parameters(), eager.parameters(), strict=True):
                other.copy_(ours.mul_(0.9))


def test_compile_with_graphs_of_a_network() -> None:
    """torch.compile's own CUDA graphs: it leaves none out, records and then replays."""
    from torch._dynamo.utils import counters

    trained = Trained.make("MMixer")
    compiled = torch.compile(trained.module, mode="reduce-overhead", fullgraph=True)
    skipped = counters["inductor"]["cudagraph_skips"]
    for _ in range(5):
        trained.change()
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(trained.backward(compiled), trained.backward())
    for _ in range(4):
        trained.change()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            results = compiled(*trained.arguments).clone()
        torch.testing.assert_close([results], trained.forward())
    assert counters["inductor"]["cudagraph_skips"] == skipped


@FORMS
@every_combination
def test_side_stream(take: Take, path: str, precision: str, context: int) -> None:
    """The operands are there only when the side stream has come so far."""
    chosen = take(path, precision, 128)
    p = of_form(Size(5, 9, 40, context, 128), chosen.dtype).on(DEVICE)
    expected = with_gradients(run(), p)
    value = p.input.clone()
    p.input.fill_(torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        p.input.copy_(value)
        results = with_gradients(run(), p)
    stream.synchronize()
    equal(results, expected)


@FORMS
@every_combination
def test_no_synchronisation(take: Take, path: str, precision: str, context: int) -> None:
    """A call makes no synchronisation that torch knows of, and waits for no sleeping GPU."""
    chosen = take(path, precision, 128)
    p = of_form(Size(3, 9, 40, context, 128), chosen.dtype).on(DEVICE)
    for _ in range(2):  # what is loaded or allocated at a first call may wait
        with_gradients(run(), p)
    torch.cuda.synchronize()
    awake = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        awake.record()
        with_gradients(run(), p)
        assert not awake.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_on_two_devices() -> None:
    p = problem(Size(3, 2, 4, 5, 33), dtype=torch.float32)
    on_gpu = p.on(DEVICE)
    with pytest.raises(ValueError, match="context must be on input's device, cuda:0, but is on"):
        run()(on_gpu.input, p.context, on_gpu.weights, None, None)
    with pytest.raises(ValueError, match="weight_f must be on input's device, cuda:0, but is on"):
        run()(on_gpu.input, on_gpu.context, p.weights, None, None)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@FORMS
def test_second_device(context: int) -> None:
    """A call runs where its tensors are, and leaves the current device as it was."""
    p = of_form(Size(5, 9, 40, context, 128), torch.float32)
    first, second = p.on("cuda:0"), p.on("cuda:1")
    results = with_gradients(run(), second)
    assert torch.cuda.current_device() == 0
    errors = relative_errors(results, reference_results(p))
    assert max(errors.values()) < 1e-5, errors
    with pytest.raises(ValueError, match="weight_f must be on input's device, cuda:1, but is on"):
        run()(second.input, second.context, first.weights, None, None)


def test_cpu_tensors_raise() -> None:
    unit = FusedMCU(2, 3, 4, engine="cuda")
    with pytest.raises(ValueError, match="takes CUDA tensors, but input is on cpu"):
        unit(torch.zeros(1, 1, 2), torch.zeros(1, 3))


def test_auto_takes_this_engine() -> None:
    p = problem(Size(3, 9, 8, 7, 128), dtype=torch.float32).on(DEVICE)
    equal(with_gradients(helpers.run("auto"), p), with_gradients(run(), p))


@every_combination
def test_nan_in_fresh_memory(
    monkeypatch: pytest.MonkeyPatch, take: Take, path: str, precision: str
) -> None:
    """All memory that the caching allocator hands out is NaN, and changes no bit."""
    chosen = take(path, precision, 250)
    p = problem(Size(5, 13, 40, 33, 250), lengths=True, dtype=chosen.dtype).on(DEVICE)
    expected = with_gradients(run(), p)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        # Blocks of up to 1 MiB come from a pool of their own.
        small = [torch.full((1 << 18,), torch.nan, device=DEVICE) for _ in range(64)]
        large = [torch.full((1 << 26,), torch.nan, device=DEVICE) for _ in range(4)]
        del small, large
        equal(with_gradients(run(), p), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cublaslt_makes_all_products_of_the_papers_sizes(precision: str) -> None:
    """PyTorch has loaded it. All of these products have 512 rows, columns or terms."""
    assert cuda._native is not None
    assert cuda._native.product_library().startswith("cuBLASLt ")
    chosen = PRECISIONS[precision]
    torch.set_float32_matmul_precision(chosen.matmul)
    for size in (Size(9, 8, 512, 512, 512), Size(13, 8, 512, 1024, 512)):
        with_gradients(run(), problem(size, lengths=True, dtype=chosen.dtype).on(DEVICE))
    assert [line for line in cuda._native.product_fallbacks() if "512" in line] == []


if not STATE.available:
    # At the end, so that every line of this file has run on a machine without a GPU too.
    pytest.skip(f"engine cuda: {STATE.reason}", allow_module_level=True)
