"""The CUDA engine against the float64 reference, its kernels run by csrc/emulator on this CPU."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import helpers
import pytest
import torch
from contract import PRECISIONS, Contract, Precision
from helpers import (
    ODD_SIZES,
    Problem,
    Size,
    forget_cuda_calls,
    op_operands,
    problem,
    reference_results,
    relative_errors,
    with_gradients,
)
from torch import Tensor

from mmixer_kernels import FusedMCU, reference
from mmixer_kernels.comparison import Case, compare, describe
from mmixer_kernels.engines import cuda
from mmixer_kernels.functional import mcu_cell, mcu_group
from mmixer_kernels.problem import Keep, Weights

pytestmark = pytest.mark.usefixtures("emulator")

run = partial(helpers.run, "cuda")
PATHS = ("cluster", "cooperative", "step")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda, "PATHS", (request.param,))
    return str(request.param)


@pytest.fixture
def samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The number of samples of a team."""
    monkeypatch.setattr(cuda, "SAMPLES", (request.param,))
    return str(request.param)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    torch.set_float32_matmul_precision(PRECISIONS[request.param].matmul)
    return str(request.param)


def check(p: Problem, precision: str, mix: str = "gated") -> None:
    errors = relative_errors(with_gradients(run(mix), p), reference_results(p, mix))
    for name, error in errors.items():
        assert error < PRECISIONS[precision].floor, (name, error)


class TestContract(Contract):
    """Teams have 4 samples and 8, where a path has teams."""

    ENGINE = "cuda"
    PAIRS = (
        *(("step", precision) for precision in PRECISIONS),
        *(
            (f"{path} {samples}", precision)
            for path in ("cluster", "cooperative")
            for samples in ("4", "8")
            for precision in PRECISIONS
            if precision != "float64"  # which has no persistent kernel
        ),
        *((f"wide {samples}", "bfloat16") for samples in ("4", "8")),
    )
    OTHERS = tuple((path, "float32") for path in PATHS)
    SIZES = (Size(3, 2, 3, 4, 20), Size(4, 13, 9, 70, 33))
    EXACT_SIZES = ODD_SIZES

    @contextmanager
    def entered(self, way: str, precision: Precision) -> Iterator[None]:
        path, *samples = way.split()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "PATHS", (path,))
            if samples:
                patch.setattr(cuda, "SAMPLES", tuple(samples))
            yield


KERNELS = [
    ("cluster", "bfloat16", 128),
    ("cluster", "bfloat16", 250),
    ("cluster", "bfloat16", 512),
    ("cluster", "bfloat16", 700),
    ("cluster", "float32-high", 256),
    ("cluster", "float32-high", 500),
    ("cluster", "float32", 256),
    ("cooperative", "bfloat16", 256),
    ("cooperative", "bfloat16", 512),
    ("cooperative", "bfloat16", 768),
    ("cooperative", "bfloat16", 1000),
    ("cooperative", "float32-high", 256),
    ("cooperative", "float32-high", 512),
    ("cooperative", "float32-high", 1024),
    ("cooperative", "float32", 256),
    ("cooperative", "float32", 512),
    ("wide", "bfloat16", 256),
    ("wide", "bfloat16", 512),
    ("cluster", "float16", 256),
    ("cooperative", "float16", 512),
    ("cooperative", "float16", 1024),
]


@pytest.mark.parametrize("samples", ["4", "8"], indirect=True)
@pytest.mark.parametrize(("path", "precision", "hidden"), KERNELS)
def test_every_kernel(
    path: str,
    precision: str,
    hidden: int,
    samples: str,
    emulator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "PATHS", (path,))
    dtype, matmul, _ = PRECISIONS[precision]
    torch.set_float32_matmul_precision(matmul)
    emulator.configure(seed=hidden, adversarial=True)
    check(problem(Size(2, 5, 4, 5, hidden), dtype=dtype), precision)


@pytest.mark.parametrize("samples", ["4", "8"], indirect=True)
def test_forward_in_float16_takes_sizes_that_backward_does_not(
    samples: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PATHS", ("cluster",))
    p = problem(Size(2, 5, 4, 5, 700), dtype=torch.float16)
    with torch.no_grad():
        output, _ = run()(p.input, p.context, p.weights, p.hx, p.lengths)
    truth = {"output": reference_results(p)["output"]}
    assert relative_errors({"output": output}, truth)["output"] < PRECISIONS["float16"].floor


def test_a_team_has_4_samples_where_all_teams_run_at_once(
    emulator: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(batch: int, resident_clusters: int, allowed: tuple[str, ...] = ("4", "8")) -> str:
        emulator.configure(resident_clusters=resident_clusters)
        helpers.forget_cuda_calls()
        monkeypatch.setattr(cuda, "SAMPLES", allowed)
        p = problem(Size(2, batch, 3, 3, 20), dtype=torch.bfloat16)
        with caplog.at_level(logging.DEBUG, "mmixer_kernels.engines.cuda"), torch.no_grad():
            run()(p.input, p.context, p.weights, p.hx, None)
        return caplog.messages[-1].rsplit("teams of ", 1)[1]

    assert samples(4, 1) == samples(8, 2) == samples(7, 2) == "4 samples"
    assert samples(8, 1) == samples(9, 2) == samples(17, 2) == "8 samples"
    assert samples(4, 1, ("8",)) == "8 samples"
    assert samples(9, 2, ("4",)) == "4 samples"


def test_float32_follows_torchs_matmul_precision() -> None:
    p = problem(Size(8, 4, 16, 16, 128), dtype=torch.float32)
    truth = reference_results(p)
    errors = {}
    for name in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(name)
        errors[name] = relative_errors(with_gradients(run(), p), truth)["output"]
    assert errors["highest"] < 1e-6 < errors["high"] < 2.0**-16
    # The products are torch's on this CPU, and some processors round them otherwise at "medium".
    assert errors["medium"] == pytest.approx(errors["high"], rel=0.1)
    # A newer name of torch's, after which the older one raises or tells what was.
    for before, name, like in (("medium", "ieee", "highest"), ("highest", "tf32", "high")):
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.matmul.fp32_precision = name
        assert relative_errors(with_gradients(run(), p), truth)["output"] == errors[like]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"], indirect=True)
def test_any_schedule_gives_equal_bits(path: str, precision: str, emulator: Any) -> None:
    size, dtype = Size(4, 11, 6, 7, 100), PRECISIONS[precision].dtype
    p = problem(size, lengths=True, bidirectional=True, dtype=dtype)
    first = with_gradients(run(), p)
    for seed in range(2, 5):
        emulator.configure(seed=seed, adversarial=seed % 2 == 0)
        for name, value in with_gradients(run(), p).items():
            assert torch.equal(value, first[name]), name


def test_teams_in_several_rounds(path: str, emulator: Any) -> None:
    """More teams than the device runs at once give the bits of those that it does."""
    p = problem(Size(3, 35, 6, 7, 40), dtype=torch.float32)
    whole = with_gradients(run(), p)
    helpers.forget_cuda_calls()
    emulator.configure(resident_clusters=1, resident_blocks=9)  # 4 blocks are a team
    for name, value in with_gradients(run(), p).items():
        assert torch.equal(value, whole[name]), name


def test_a_sum_of_squares_that_overflows_makes_no_nan(path: str) -> None:
    """The norm's operand counts as 0 then, as 1 over an infinite deviation is."""
    p = problem(Size(3, 4, 6, 7, 24), dtype=torch.float32)
    with torch.no_grad():
        p.weights.weight_r.mul_(1e20)
        p.input[0, 1] *= 1e20
    for name, value in with_gradients(run(), p).items():
        assert value.isfinite().all(), name


@pytest.mark.slow
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
    arguments, grads = op_operands(**options)
    forward = torch.ops.mmixer_kernels.mcu_forward.default
    backward = torch.ops.mmixer_kernels.mcu_backward.default
    options = "cuda", "gates"
    torch.library.opcheck(forward, (*arguments, *options))
    _, _, saved = forward(*arguments, *options)
    grads = [grad.requires_grad_() for grad in grads]
    call = (*grads, saved.detach(), *arguments, *options, True, True)
    torch.library.opcheck(backward, call)


@pytest.mark.parametrize("context_size", [5, 0])
def test_compile(context_size: int) -> None:
    p = problem(Size(2, 3, 4, context_size, 20), dtype=torch.float32)
    unit = FusedMCU(4, context_size, 20, engine="cuda")
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    for name, value in with_gradients_of(compiled, p).items():
        assert torch.equal(value, with_gradients_of(unit, p)[name]), name


def with_gradients_of(unit: torch.nn.Module, p: Problem) -> dict[str, Tensor]:
    output, h_n = unit(p.input, p.context)
    loss = (output * p.grad_output).sum() + (h_n[0] * p.grad_h_n).sum()
    names, parameters = zip(*unit.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    named = {name.removeprefix("_orig_mod."): g for name, g in zip(names, grads, strict=True)}
    return {"output": output.detach(), **named}


def test_the_log_tells_path_and_reason(
    caplog: pytest.LogCaptureFixture, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path_of(size: Size, dtype: torch.dtype) -> str:
        caplog.clear()
        p = problem(size, dtype=dtype)
        with caplog.at_level(logging.DEBUG, "mmixer_kernels.engines.cuda"), torch.no_grad():
            run()(p.input, p.context, p.weights, p.hx, None)
        assert caplog.messages[-1].endswith(cuda.path(p.call(), backward=False))
        return caplog.messages[-1]

    assert "path cluster, H padded to 128, 3 terms" in path_of(Size(2, 2, 3, 3, 20), torch.float32)
    message = path_of(Size(2, 2, 3, 3, 20), torch.float64)
    assert "path step" in message
    assert "no kernel for torch.float64" in message
    emulator.configure(resident_clusters=0)
    helpers.forget_cuda_calls()
    message = path_of(Size(2, 2, 3, 3, 20), torch.float32)
    assert "path cooperative" in message
    assert "cluster: the emulator was told to run none" in message
    emulator.configure(resident_clusters=1, resident_blocks=4)
    helpers.forget_cuda_calls()
    message = path_of(Size(1, 73, 3, 3, 20), torch.float32)
    assert "path step" in message
    assert "10 teams, 1 at once" in message


def test_compare_checks_the_engine_and_tells_its_path() -> None:
    report = compare(Case(2, 2, 16, 4, 3, engine="cuda"), 0.01)
    assert report["engine"]["name"] == "cuda"
    for way in report["engine"]["ways"].values():
        assert way.startswith("path cluster, H padded to")
    assert report["check"]["error"] < 1e-4
    assert report["saved_bytes"]["FusedMCU, recompute=True"] == 4 * 2 * 2 * 16
    assert "path cluster" in describe(report)


def test_sizes_beyond_every_persistent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    check(problem(Size(2, 2, 3, 4, 1030), dtype=torch.float32), "float32")
    monkeypatch.setattr(cuda, "PATHS", ("cluster", "cooperative"))
    p = problem(Size(1, 1, 3, 4, 1030), dtype=torch.float32)
    with pytest.raises(
        RuntimeError, match="no path of cluster, cooperative takes this call: cluster: no kernel"
    ):
        run()(p.input, p.context, p.weights, p.hx, None)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Prepared(NamedTuple):
    weights: Tensor  # `[G, 3, H, H]`, as are `matrices`
    matrices: Tensor
    split: Tensor | None  # `[G, terms, 3, padded, padded]`


def prepared(
    emulator: ModuleType,
    size: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    padded: int = 0,
    terms: int = 0,
    term_dtype: torch.dtype | None = None,
    offsets: tuple[int, int] = (0, 0),
    transposed: bool = False,
    remove_mean: bool = False,
) -> Prepared:
    """Random weights and what the kernel made of them. Offsets, in elements from an aligned
    address, and dtypes: of the weights and of the matrices, beside which nothing is written."""
    G, hidden = size
    buffers = [
        torch.full((offset + G * 3 * hidden**2 + 16,), torch.nan, dtype=dtype)
        for offset, dtype in zip(offsets, dtypes, strict=True)
    ]
    weights, matrices = (
        buffer[offset:-16].view(G, 3, hidden, hidden)
        for offset, buffer in zip(offsets, buffers, strict=True)
    )
    weights.copy_(torch.rand(weights.shape, generator=torch.Generator().manual_seed(hidden)))
    split = None
    if term_dtype is not None:
        split = torch.full((G, terms, 3, padded, padded), torch.nan, dtype=term_dtype)
    rest = dict.fromkeys(Weights._fields)
    sets = [
        emulator.WeightSet(**{**rest, "weight_r": r, "weight_z": z, "weight_h": h})
        for r, z, h in weights
    ]
    emulator.prepare(
        sets=sets,
        first=0,
        weight_dtype=weights.dtype,
        norm_dtype=weights.dtype,
        transposed=transposed,
        remove_mean=remove_mean,
        matrices=matrices,
        matrices_dtype=matrices.dtype,
        split_weights=split,
        term_dtype=term_dtype or torch.bfloat16,
        norms=None,
        **{"G": G, "H": hidden, "Hp": padded, "terms": terms},
    )
    for offset, buffer in zip(offsets, buffers, strict=True):
        assert buffer[:offset].isnan().all()
        assert buffer[-16:].isnan().all()
    return Prepared(weights, matrices, split)


def check_matrices(p: Prepared, remove_mean: bool) -> None:
    truth = p.weights.double()
    if remove_mean:
        truth = truth - truth.mean(-2, keepdim=True)
    eps = torch.finfo(p.matrices.dtype).eps / 2  # weights are at most 1, sums of float32 at least
    eps += 2 * torch.finfo(reference.compute_dtype(p.weights.dtype)).eps * remove_mean
    torch.testing.assert_close(p.matrices.double(), truth, rtol=0, atol=eps)


@pytest.mark.parametrize("hidden", [1, 7, 16, 40, 77, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_matrices(dtype: torch.dtype, hidden: int, emulator: ModuleType) -> None:
    for matrices_dtype, offsets, remove_mean in itertools.product(
        DTYPES, [(0, 0), (1, 0), (0, 1), (8, 8)], [False, True]
    ):
        dtypes = dtype, matrices_dtype
        p = prepared(emulator, (2, hidden), dtypes, offsets=offsets, remove_mean=remove_mean)
        check_matrices(p, remove_mean)


@pytest.mark.parametrize(("hidden", "padded"), [(1, 8), (7, 16), (33, 40), (48, 128), (130, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_terms(dtype: torch.dtype, hidden: int, padded: int, emulator: ModuleType) -> None:
    """The terms add up to the matrices in float32, with zeros beyond them."""
    kinds = [*((torch.bfloat16, terms) for terms in (1, 2, 3)), (torch.float16, 1)]
    for (term_dtype, terms), transposed, remove_mean in itertools.product(
        kinds, [False, True], [False, True]
    ):
        options = {"transposed": transposed, "remove_mean": remove_mean}
        dtypes = dtype, torch.float32
        p = prepared(emulator, (2, hidden), dtypes, padded, terms, term_dtype, **options)
        check_matrices(p, remove_mean)
        check_terms(p, transposed)


def check_terms(p: Prepared, transposed: bool) -> None:
    assert p.split is not None
    margin = p.split.shape[-1] - p.matrices.shape[-1]
    rest = torch.nn.functional.pad(p.matrices.mT if transposed else p.matrices, (0, margin) * 2)
    for term in p.split.unbind(1):
        expected = rest.to(term.dtype)
        assert torch.equal(term, expected)
        rest = rest - expected.float()


@pytest.mark.parametrize("transposed", [False, True])
def test_prepared_in_turn(transposed: bool, emulator: ModuleType) -> None:
    """Shared memory does not hold all rows at once."""
    p = prepared(emulator, (1, 1501), (torch.float64, torch.float64), remove_mean=transposed)
    check_matrices(p, transposed)
    options = {"transposed": transposed, "remove_mean": True}
    dtypes = torch.float64, torch.float32
    for hidden, padded in [(755, 768), (762, 776)]:
        p = prepared(emulator, (1, hidden), dtypes, padded, 2, torch.bfloat16, **options)
        check_matrices(p, remove_mean=True)
        check_terms(p, transposed)


@pytest.mark.parametrize("hidden", [127, 128, 129, 1024, 1025, 2100])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"], indirect=True)
def test_rows_of_any_length(
    precision: str, hidden: int, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warp has 128 columns of a row, a block up to 1024 in registers, the rest in memory."""
    monkeypatch.setattr(cuda, "PATHS", ("step",))
    emulator.configure(seed=hidden, adversarial=True)
    for layer_norm in (True, False):
        p = problem(
            Size(2, 2, 3, 4, hidden), layer_norm=layer_norm, dtype=PRECISIONS[precision].dtype
        )
        check(p, precision)


def grouped(problems: list[Problem]) -> list[dict[str, Tensor]]:
    """output, h_n and every gradient of each weight set of one call."""
    return TestContract().results_of_group(problems)


GROUPED = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 weights": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("dtypes", GROUPED)
def test_weight_sets_of_equal_sizes_have_the_bits_that_each_has_alone(
    dtypes: str, lengths: bool
) -> None:
    """Operands of one product of all sets are copied first."""
    dtype, weight_dtype = GROUPED[dtypes]
    problems = [problem(Size(3, 4, 6, 7, 20), lengths=True, dtype=weight_dtype) for _ in range(3)]
    problems = [p.to(dtype)._replace(weights=p.weights) for p in problems]
    shared = problems[0].lengths if lengths else None
    problems = [p._replace(lengths=shared) for p in problems]
    one_input = [p._replace(input=problems[0].input) for p in problems]
    for each in (problems, one_input):
        for p, results in zip(each, grouped(each), strict=True):
            for name, expected in with_gradients(run(), p).items():
                assert torch.equal(results[name], expected), name


@pytest.mark.parametrize("context_size", [2, 0])
def test_more_weight_sets_and_copies_than_a_launch_takes(path: str, context_size: int) -> None:
    size = Size(2, 2, 2, context_size, 3)
    problems = [problem(size, dtype=torch.float32) for _ in range(18)]
    lengths = torch.tensor([1, 2])
    problems = [
        p._replace(lengths=lengths, weights=p.weights.map(torch.Tensor.bfloat16)) for p in problems
    ]
    for p, results in zip(problems, grouped(problems), strict=True):
        for name, expected in with_gradients(run(), p).items():
            assert torch.equal(results[name], expected), name


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mix", ["gated", "concat", "none"])
def test_a_gradient_alone_has_the_bits_that_it_has_among_all(
    path: str, mix: str, groups: int, emulator: ModuleType
) -> None:
    """Nothing unneeded is launched: the fewer launches, the fewer gradients. Without context there
    is nothing to mix."""
    size = Size(3, 4, 6, 0 if mix == "none" else 7, 20)
    problems = [problem(size, dtype=torch.float32) for _ in range(groups)]
    named = {
        "input": [p.input for p in problems],
        "context": [p.context for p in problems if p.context is not None],
        "weight_r": [p.weights.weight_r for p in problems],
        "hx": [torch.stack([p.hx for p in problems])],
    }
    if mix == "none":
        mix = "gated"
        del named["context"]
    weights, (hx,) = [p.weights for p in problems], named["hx"]
    cotangents = [torch.randn(groups, *size) for size in ((3, 4, 20), (4, 20))]

    def grads(*names: str) -> tuple[dict[str, list[Tensor]], int]:
        for name, tensors in named.items():
            for x in tensors:
                x.requires_grad_(name in names)
        leaves = [x for name in names for x in named[name]]
        operands = named["input"], named.get("context"), weights, hx
        results = mcu_group(*operands, mix=mix, engine="cuda")
        emulator.clear_launches()
        found = iter(torch.autograd.grad(results, leaves, cotangents))
        gradients = {name: [next(found) for _ in named[name]] for name in names}
        return gradients, sum(emulator.launches().values())

    expected, most = grads(*named)
    launched = {}
    for name in named:
        gradients, launched[name] = grads(name)
        for x, y in zip(gradients[name], expected[name], strict=True):
            assert torch.equal(x, y), name
    assert launched["hx"] < launched["input"] < launched["weight_r"] < most
    if "context" in named:
        assert launched["hx"] < launched["context"] < launched["weight_r"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    """Rows with gaps between them are read where they lie, also a single one with any stride."""

    def apart(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., :-3] = x
        return wide[..., :-3]

    for size in (Size(4, 3, 5, 7, 20), Size(1, 3, 5, 7, 20), Size(4, 1, 5, 7, 20)):
        p = problem(size, dtype=dtype)
        names = ("input", "context", "hx", "grad_output", "grad_h_n")
        q = p._replace(**{name: apart(getattr(p, name)) for name in names})
        if size.batch == 1:
            q = q._replace(
                input=apart(p.input.expand(-1, 2, -1))[:, :1],
                context=p.context.as_strided(p.context.shape, (1, 1)),
            )
        expected = with_gradients(run(), p)
        for name, value in with_gradients(run(), q).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [Size(1, 1, 1, 1, 1), Size(5, 3, 4, 6, 33), Size(1, 1, 1, 0, 1), Size(5, 3, 4, 0, 33)]
)
def test_saved_memory(size: Size, dtype: torch.dtype) -> None:
    """The extension allocates as much as is said for compilers, and writes all of it."""
    call = problem(size, dtype=dtype).call()
    keeps: tuple[Keep, ...] = ("states", "gates")
    for keep in keeps:
        _, _, saved = cuda.forward(call, keep)
        assert saved is not None
        assert saved.numel() == cuda.saved_size(call, keep)
        assert saved.isfinite().all()
    assert cuda.forward(call, "nothing")[2] is None
    assert cuda.saved_size(call, "nothing") == 0


def test_saved_memory_of_large_sequences() -> None:
    """Per number of the output: the states, and with the gates 3 or 4 more, of 4 bytes each;
    without context 1.5 or 2."""
    size = 128 * 8 * 64
    of_dtype = {torch.bfloat16: (4, 2.5), torch.float32: (5, 3), torch.float64: (5, 3)}
    for dtype, each in of_dtype.items():
        for context_size, numbers in zip((4, 0), each, strict=True):
            call = problem(Size(128, 8, 4, context_size, 64), dtype=dtype).call()
            assert cuda.saved_size(call, "states") == size
            assert numbers <= cuda.saved_size(call, "gates") / size < numbers + 0.1


STEP_DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16 weights": (torch.float32, torch.bfloat16),
}
STEP_SIZES = [
    *(Size(1, 1, 1, 1, 1), Size(1, 17, 5, 9, 33), Size(1, 3, 16, 24, 40)),
    Size(1, 2, 7, 8, 12),  # rows of weight_f alone are not aligned
    *(Size(1, 1, 1, 0, 1), Size(1, 17, 5, 0, 33), Size(1, 3, 16, 0, 40)),
]


def step_problem(size: Size, dtype: torch.dtype, weight_dtype: torch.dtype, **options: Any) -> Any:
    p = problem(size, dtype=weight_dtype, **options)
    return p.to(dtype)._replace(weights=p.weights)


def step(p: Problem, mix: str = "gated") -> Tensor:
    with torch.no_grad():
        return mcu_cell(p.input[0], p.context, p.weights, p.hx, mix=mix, engine="cuda")


@pytest.mark.parametrize("dtypes", STEP_DTYPES)
@pytest.mark.parametrize("mix", ["gated", "concat"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_step_is_one_launch(
    dtypes: str, mix: str, layer_norm: bool, emulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    cell = emulator.cell
    counted = SimpleNamespace(**vars(emulator))
    counted.cell = lambda **fields: (launched.append(1), cell(**fields))
    monkeypatch.setattr(cuda, "_native", counted)
    monkeypatch.setattr(cuda, "forward", None)
    emulator.configure(resident_blocks=12)  # so that a team has several samples
    dtype, weight_dtype = STEP_DTYPES[dtypes]
    bound = 16 * torch.finfo(dtype).eps
    for size in STEP_SIZES:
        p = step_problem(size, dtype, weight_dtype, layer_norm=layer_norm)
        for operands in (p, p._replace(hx=None)):
            launched.clear()
            h_n = step(operands, mix)
            assert launched == [1]
            truth = reference_results(operands, mix)["h_n"]
            assert relative_errors({"h_n": h_n.unsqueeze(0)}, {"h_n": truth})["h_n"] < bound


@pytest.mark.parametrize("dtypes", STEP_DTYPES)
@pytest.mark.parametrize("misaligned", ["none", "weight_r", "weight_z", "all"])
@pytest.mark.parametrize("context_size", [20, 0])
def test_step_of_rows_that_take_several_rounds(
    dtypes: str, context_size: int, misaligned: str, emulator: ModuleType
) -> None:
    """There are more columns than loads in flight, and more rows than warps."""
    emulator.configure(resident_blocks=3)
    dtype, weight_dtype = STEP_DTYPES[dtypes]
    p = step_problem(Size(1, 3, 1060, context_size, 140), dtype, weight_dtype)
    weights = {
        name: one_element_further(x) if x is not None and misaligned in ("all", name) else x
        for name, x in p.weights._asdict().items()
    }
    p = p._replace(weights=Weights(**weights))
    truth = reference_results(p)["h_n"]
    error = relative_errors({"h_n": step(p).unsqueeze(0)}, {"h_n": truth})["h_n"]
    assert error < 16 * torch.finfo(dtype).eps


def one_element_further(x: Tensor) -> Tensor:
    """The same values, contiguous, at an address that loads of several cannot take."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("context_sizes", [(7, 7), (7, 0), (0, 7)])
def test_step_after_step_is_the_sequence_whatever_ran_between(
    context_sizes: tuple[int, int],
) -> None:
    """A workspace is used again, by other batches too, with context or without."""
    p, others = (
        problem(Size(steps, batch, 6, context_size, 33))
        for (steps, batch), context_size in zip([(4, 11), (1, 20)], context_sizes, strict=True)
    )
    state = p.hx
    for t in range(4):
        state = step(p._replace(input=p.input[t : t + 1], hx=state))
        step(others)
    truth = reference_results(p)["h_n"]
    assert relative_errors({"h_n": state.unsqueeze(0)}, {"h_n": truth})["h_n"] < 1e-13


def test_a_stream_has_a_workspace_of_its_own_also_under_another_ones_handle(
    emulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that was destroyed may still run its last step."""
    p = problem(Size(1, 3, 6, 7, 33), dtype=torch.float32)
    stub = SimpleNamespace(**vars(emulator))
    used = []

    def cell(**fields: Any) -> None:
        used.append(fields["workspace"].data_ptr())
        emulator.cell(**fields)

    stub.cell = cell
    monkeypatch.setattr(cuda, "_native", stub)
    for number in (1, 2, 1, 2):
        stub.stream_number = lambda stream, number=number: number
        step(p)
    assert used[0] != used[1]
    assert used == used[:2] * 2
    monkeypatch.setattr(cuda, "_MOST_WORKSPACES", 3)
    for number in range(3, 9):
        stub.stream_number = lambda stream, number=number: number
        step(p)
    assert len(cuda._workspaces) == 3


def test_step_gives_the_same_bits_under_any_schedule(emulator: ModuleType) -> None:
    p = problem(Size(1, 9, 6, 7, 40), dtype=torch.float32)
    first = step(p)
    for seed in range(2, 8):
        emulator.configure(seed=seed, adversarial=seed % 2 == 0, resident_blocks=5 + seed)
        helpers.forget_cuda_calls()
        assert torch.equal(step(p), first)


def test_step_reads_strided_rows() -> None:
    p = problem(Size(1, 3, 9, 7, 20))
    wide = torch.full((3, 2, 9), torch.nan, dtype=torch.float64)
    wide[:, 0] = p.input[0]
    expanded = p._replace(input=wide[None, :, 0], hx=p.hx[:1].expand(3, -1))
    truth = reference_results(expanded._replace(hx=expanded.hx.contiguous()))["h_n"]
    error = relative_errors({"h_n": step(expanded).unsqueeze(0)}, {"h_n": truth})["h_n"]
    assert error < 1e-13


@pytest.mark.parametrize("blocks", [0, 132])
def test_a_step_that_no_launch_takes_goes_the_general_way(
    blocks: int, emulator: ModuleType
) -> None:
    emulator.configure(resident_blocks=blocks)
    p = problem(Size(1, 2 if blocks == 0 else 65, 6, 7, 20))
    truth = reference_results(p)["h_n"]
    assert relative_errors({"h_n": step(p).unsqueeze(0)}, {"h_n": truth})["h_n"] < 1e-13


def test_step_of_long_rows(emulator: ModuleType) -> None:
    """Rows may have more packets and columns than a thread takes at once."""
    emulator.configure(resident_blocks=65)  # a team of all samples
    p = step_problem(Size(1, 8, 20, 12, 520), torch.float32, torch.float32)
    truth = reference_results(p)["h_n"]
    error = relative_errors({"h_n": step(p).unsqueeze(0)}, {"h_n": truth})["h_n"]
    assert error < 16 * torch.finfo(torch.float32).eps


def test_a_step_of_few_samples_has_a_block_for_each_processor(emulator: ModuleType) -> None:
    def plan(batch: int, resident_blocks: int) -> tuple[int, int]:
        emulator.configure(resident_blocks=resident_blocks)
        sizes = {"input_size": 512, "context_size": 512, "hidden": 512}
        dtypes = {"dtype": torch.float32, "weight_dtype": torch.bfloat16}
        samples, blocks, _, _ = emulator.cell_plan(batch=batch, **sizes, **dtypes)
        return samples, blocks

    assert plan(1, 132) == (1, 64)
    assert plan(8, 132) == (4, 64)
    assert plan(8, 600) == (1, 64)
    assert plan(9, 100) == (5, 50)


@pytest.mark.parametrize("name", ["batch", "input_size", "context_size", "hidden"])
def test_a_size_that_is_no_int_has_no_plan_of_a_step(name: str, emulator: ModuleType) -> None:
    sizes = {"batch": 8, "input_size": 8, "context_size": 8, "hidden": 8, name: 2**32 + 8}
    dtypes = {"dtype": torch.float32, "weight_dtype": torch.float32}
    assert emulator.cell_plan(**sizes, **dtypes) == (0, 0, 0, "a size of 4294967304")


@pytest.mark.parametrize("hidden", [33, 1030])
def test_blocks_that_have_several_rows(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that sums over rows has 256 blocks per weight set."""
    monkeypatch.setattr(cuda, "PATHS", ("step",))
    size = Size(2, 130, 7, 8, hidden) if hidden == 33 else Size(1, 259, 2, 2, hidden)
    check(problem(size), "float64")


def test_what_multiplies_has_a_name(emulator: ModuleType) -> None:
    assert emulator.product_library() == "loops on a CPU"
    emulator.configure(product_kernel=True)
    assert emulator.product_library().startswith("own kernel: ")
    assert emulator.product_fallbacks() == []


def test_slow_products_are_told_once(
    emulator: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass without cuBLASLt warns, and a product that it does not take is logged."""
    emulator.configure(product_kernel=True)
    monkeypatch.setattr(emulator, "product_fallbacks", lambda: ["7x8x9: not supported"])
    p = problem(Size(2, 1, 3, 4, 5), dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="the emulator was told so, so that a kernel"):
        with_gradients(run(), p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_gradients(run(), p)
        forget_cuda_calls()
        emulator.configure()
        with_gradients(run(), p)
    told = [record for record in caplog.records if "7x8x9: not supported" in record.message]
    assert [record.levelname for record in told] == ["WARNING", "WARNING"]
