"""The tests that every engine must pass: a test file makes a subclass of `Contract`, which says
which engine and how it is entered, and keeps what is particular to its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import helpers
import pytest
import torch
from helpers import Problem, Size, problem, reference_results, relative_errors, with_gradients
from torch import Tensor

from mmixer_kernels.engines import get, native_of
from mmixer_kernels.functional import mcu, mcu_cell, mcu_group
from mmixer_kernels.problem import Cotangents, Keep, Need, Step, Weights
from mmixer_kernels.problem import Problem as Call

Results = dict[str, Tensor]
SLACK = 1.3
"""An engine's largest error over eager PyTorch's: a handful of roundings, whoever does them."""


class Precision(NamedTuple):
    dtype: torch.dtype
    matmul: str  # torch.get_float32_matmul_precision()
    floor: float  # a few roundings: what a problem of few products may have over eager PyTorch's


PRECISIONS = {
    "float64": Precision(torch.float64, "highest", 1e-13),
    "float32": Precision(torch.float32, "highest", 32 * 2.0**-24),
    "float32-high": Precision(torch.float32, "high", 4 * 2.0**-16),  # two bfloat16 terms
    "bfloat16": Precision(torch.bfloat16, "highest", 4 * 2.0**-8),
    "float16": Precision(torch.float16, "highest", 4 * 2.0**-11),
}


class Options(NamedTuple):
    mix: str
    layer_norm: bool
    lengths: bool
    hx: bool
    context: bool = True
    bidirectional: bool = False

    def words(self) -> list[str]:
        """The mix, and the names of what there is."""
        return [self.mix, *(name for name, x in self._asdict().items() if x is True)]

    def problem(self, size: Size, dtype: torch.dtype) -> Problem:
        _, layer_norm, lengths, hx, context, bidirectional = self
        size = size if context else size._replace(context=0)
        p = problem(
            size, layer_norm=layer_norm, lengths=lengths, bidirectional=bidirectional, dtype=dtype
        )
        return p if hx else p._replace(hx=None)


OPTIONS = [
    Options("gated", True, True, True),
    Options("gated", True, False, True),
    Options("gated", False, True, False, bidirectional=True),
    Options("concat", True, True, False),
    Options("concat", False, False, False, bidirectional=True),
    Options("concat", False, True, True),
    Options("gated", True, True, True, context=False, bidirectional=True),
    Options("gated", False, False, False, context=False),
]
"""Each pair of values, and what users have most."""


def eager(device: str, dtype: torch.dtype, mix: str = "gated") -> Callable[..., Any]:
    """The reference in products of that dtype: under autocast where it is a narrow one."""
    narrow = dtype in (torch.bfloat16, torch.float16)

    def function(*operands: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype) if narrow else nullcontext():
            return helpers.exact(*operands, mix=mix)

    return function


def compare(results: Results, theirs: Results, truth: Results, floor: float) -> None:
    """No error against the float64 truth is larger than eager PyTorch's and the floor."""
    ours, eagers = relative_errors(results, truth), relative_errors(theirs, truth)
    wrong = {
        name: f"{error:.1e}, eager PyTorch {eagers[name]:.1e}"
        for name, error in ours.items()
        if not error <= SLACK * eagers[name] + floor
    }
    assert not wrong, wrong


def equal(results: Results, expected: Results) -> None:
    differ = [name for name, x in results.items() if not torch.equal(x, expected[name])]
    assert not differ, differ


def in_every_precision(test: Any) -> Any:
    """The test runs in each of `Contract.PAIRS`, others in each of `Contract.OTHERS`."""
    test.in_every_precision = True
    return test


class Contract:
    ENGINE: ClassVar[str]
    DEVICE: ClassVar[str] = "cpu"
    PRECISIONS: ClassVar[dict[str, Precision]] = PRECISIONS
    PAIRS: ClassVar[Sequence[tuple[str, str]]] = [
        ("", name) for name in PRECISIONS if name != "float32-high"
    ]
    """A way in which the engine is entered, and a precision that it has there."""
    OTHERS: ClassVar[Sequence[tuple[str, str]]] = [("", "float32")]
    SIZES: ClassVar[Sequence[Size]] = [Size(1, 1, 1, 1, 1), Size(3, 5, 7, 9, 33)]
    EXACT_SIZES: ClassVar[Sequence[Size]] = helpers.ODD_SIZES
    """Sizes in float64 alone: LayerNorm over few units has an ill-conditioned gradient."""
    SIZE: ClassVar[Size] = Size(4, 5, 6, 7, 20)
    LARGE: ClassVar[Size] = Size(12, 8, 64, 64, 128)
    """Roundings average here."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "precision" not in metafunc.fixturenames:
            return
        every = hasattr(metafunc.function, "in_every_precision")
        names, cases, ids = ["precision"], [], []
        for pair in self.PAIRS if every else self.OTHERS:
            if "options" not in metafunc.fixturenames:
                cases.append((pair,))
                ids.append("-".join(filter(None, pair)))
                continue
            names = ["precision", "options"]
            for options in self.options_of(pair[1]):
                cases.append((pair, options))
                ids.append("-".join([*filter(None, pair), *options.words()]))
        metafunc.parametrize(names, cases, ids=ids, indirect=["precision"])

    def options_of(self, precision: str) -> Sequence[Options]:
        """The options with which errors are looked at in a precision."""
        return OPTIONS

    @pytest.fixture
    def precision(self, request: pytest.FixtureRequest) -> Iterator[Precision]:
        way, name = request.param
        precision = self.PRECISIONS[name]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision.matmul)
        with self.entered(way, precision):
            yield precision
        torch.set_float32_matmul_precision(before)

    def entered(self, way: str, precision: Precision) -> AbstractContextManager[object]:
        """The context in which calls go that way; skips the test where there is none."""
        return nullcontext()

    def results(self, p: Problem, mix: str = "gated", **options: bool) -> Results:
        """output, h_n and every gradient, on the CPU."""
        function = helpers.run(self.ENGINE, mix, **options)
        results = with_gradients(function, p.on(self.DEVICE))
        return {name: x.cpu() for name, x in results.items()}

    def check(self, p: Problem, precision: Precision, mix: str = "gated", **options: Any) -> None:
        floor = options.pop("floor", precision.floor)
        theirs = with_gradients(eager(self.DEVICE, precision.dtype, mix), p.on(self.DEVICE))
        compare(self.results(p, mix, **options), theirs, reference_results(p, mix), floor)

    def test_what_it_says_of_itself(self) -> None:
        engine = get(self.ENGINE)
        assert self.ENGINE == engine.NAME
        assert not engine.DEVICES or self.DEVICE in engine.DEVICES
        for state in (engine.state(), engine.state(torch.device(self.DEVICE))):
            assert state.available
            assert state.reason

    @in_every_precision
    def test_error(self, precision: Precision, options: Options) -> None:
        exact = precision.dtype == torch.float64
        for size in (*self.SIZES, *(self.EXACT_SIZES if exact else ())):
            self.check(options.problem(size, precision.dtype), precision, options.mix)

    @in_every_precision
    def test_error_is_no_larger_than_eager_pytorch(self, precision: Precision) -> None:
        """The bound has no floor, but where eager PyTorch computes in more precision than the
        engine: it is the truth in float64, and on a CPU its float32 is float32 whatever is asked
        for."""
        more = precision.dtype == torch.float64 or (
            precision.matmul != "highest" and self.DEVICE == "cpu"
        )
        p = problem(self.LARGE, dtype=precision.dtype)
        self.check(p, precision, floor=precision.floor if more else 0.0)

    def test_weight_sets_of_one_call(self, precision: Precision) -> None:
        """Three weight sets whose sizes of input and context differ are each as near to float64."""
        T, B, _, _, H = self.SIZE
        sizes = [Size(T, B, f, c, H) for f, c in ((6, 9), (17, 3), (1, 20))]
        problems = [problem(size, dtype=precision.dtype) for size in sizes]
        lengths = torch.randint(1, T + 1, (B,))
        problems = [p._replace(lengths=lengths) for p in problems]
        for p, results in zip(problems, self.results_of_group(problems), strict=True):
            theirs = with_gradients(eager(self.DEVICE, precision.dtype), p.on(self.DEVICE))
            assert results.keys() == theirs.keys()
            compare(results, theirs, reference_results(p), precision.floor)

    def results_of_group(self, problems: Sequence[Problem]) -> list[Results]:
        leaves = [
            {name: x.detach().requires_grad_() for name, x in p.on(self.DEVICE).operands().items()}
            for p in problems
        ]
        lengths = problems[0].lengths
        output, h_n = mcu_group(
            [named["input"] for named in leaves],
            [named["context"] for named in leaves] if "context" in leaves[0] else None,
            [Weights(*(named.get(name) for name in Weights._fields)) for named in leaves],
            torch.stack([named["hx"] for named in leaves]),
            None if lengths is None else lengths.to(self.DEVICE),
            engine=self.ENGINE,
        )
        cotangents = [
            torch.stack([getattr(p, name) for p in problems]).to(self.DEVICE)
            for name in ("grad_output", "grad_h_n")
        ]
        flat = [x for named in leaves for x in named.values()]
        grads = iter(torch.autograd.grad((output, h_n), flat, cotangents))
        return [
            {"output": output[g].detach(), "h_n": h_n[g].detach()}
            | {f"grad {name}": next(grads) for name in named}
            for g, named in enumerate(leaves)
        ]

    def test_every_gradient_is_like_its_operand(self, precision: Precision) -> None:
        p = problem(self.SIZE, dtype=precision.dtype)
        results, operands = self.results(p), p.operands()
        assert len(operands) == 3 + len(Weights._fields)
        for name, x in operands.items():
            grad = results[f"grad {name}"]
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype), name

    @pytest.mark.parametrize("alone", ["output", "h_n"])
    def test_a_gradient_of_one_result_alone(self, precision: Precision, alone: str) -> None:
        """The other result's gradient is zero, and not what memory holds."""
        p = problem(self.SIZE, lengths=True, dtype=precision.dtype)
        other = "grad_h_n" if alone == "output" else "grad_output"
        p = p._replace(**{other: torch.zeros_like(getattr(p, other))})
        both = self.results(p)
        theirs = with_gradients(eager(self.DEVICE, precision.dtype), p.on(self.DEVICE))
        compare(both, theirs, reference_results(p), precision.floor)
        q = p.on(self.DEVICE)
        named = {name: x.requires_grad_() for name, x in q.operands().items()}
        result = dict(zip(("output", "h_n"), helpers.run(self.ENGINE)(*q[:5]), strict=True))[alone]
        grads = torch.autograd.grad(result, list(named.values()), getattr(q, f"grad_{alone}"))
        equal({f"grad {name}": x.cpu() for name, x in zip(named, grads, strict=True)}, both)

    def test_bits_are_equal_whatever_fresh_memory_holds(
        self, precision: Precision, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is NaN in every test here (tests/engines/conftest.py)."""
        p = problem(self.SIZE, lengths=True, dtype=precision.dtype)
        expected = self.results(p)
        assert all(x.isfinite().all() for x in expected.values())
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        equal(self.results(p), expected)

    def test_recompute_gives_the_same_bits(self, precision: Precision, options: Options) -> None:
        p = options.problem(self.SIZE, precision.dtype)
        equal(self.results(p, options.mix, recompute=True), self.results(p, options.mix))

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_strided_and_expanded_operands(self, precision: Precision, bidirectional: bool) -> None:
        p = problem(self.SIZE, bidirectional=bidirectional, dtype=precision.dtype)
        self.check(p, precision, batch_first=True)
        self.check(p.strided(), precision)
        self.check(p.expanded(), precision)

    def test_a_sample_ends_at_its_length(self, precision: Precision) -> None:
        """Nothing past it is read, the output there is 0, and h_n is the last valid step, or the
        first of the other direction."""
        T, B, _, _, H = self.SIZE
        p = problem(self.SIZE, bidirectional=True, dtype=precision.dtype)
        lengths = torch.tensor([(2, T, 1)[b % 3] for b in range(B)])
        p = p._replace(lengths=lengths)
        clean = self.results(p)
        padding = torch.arange(T)[:, None] >= lengths
        assert (clean["output"][padding] == 0).all()
        last = clean["output"][lengths - 1, torch.arange(B), :H]
        assert torch.equal(clean["h_n"], torch.stack([last, clean["output"][0, :, H:]]))
        dirty = p._replace(
            input=p.input.masked_fill(padding[..., None], torch.nan),
            grad_output=p.grad_output.masked_fill(padding[..., None], torch.nan),
        )
        equal(self.results(dirty), clean)

    def test_nan_stays_with_its_sample(self, precision: Precision) -> None:
        p = problem(self.SIZE, dtype=precision.dtype)
        clean = self.results(p)
        p.input[2, 1, 0] = torch.nan
        dirty = self.results(p)
        assert dirty["output"][2:, 1].isnan().all()
        assert dirty["h_n"][1].isnan().all()
        assert torch.equal(dirty["output"][:2], clean["output"][:2])
        others = [0, *range(2, self.SIZE.batch)]
        for name in ("output", "grad input"):
            assert torch.equal(dirty[name][:, others], clean[name][:, others]), name
        for name in ("h_n", "grad context", "grad hx"):
            assert torch.equal(dirty[name][others], clean[name][others]), name

    @pytest.mark.parametrize("context", [True, False])
    def test_bfloat16_weights_beside_float32(self, precision: Precision, context: bool) -> None:
        """Results are as near to float64 on the rounded weights as with float32 weights."""
        size = self.SIZE if context else self.SIZE._replace(context=0)
        p = problem(size, dtype=torch.float32)
        wide, narrow = PRECISIONS["float32"].floor, PRECISIONS["bfloat16"].floor
        for norms in (torch.bfloat16, torch.float32):
            norm_weight, norm_bias = (x.to(norms) for x in p.weights.norms())
            weights = p.weights.map(torch.Tensor.bfloat16)
            weights = weights._replace(norm_weight=norm_weight, norm_bias=norm_bias)
            q = p._replace(weights=weights)
            results, truth = self.results(q), reference_results(q)
            theirs = with_gradients(eager(self.DEVICE, torch.float32), q.on(self.DEVICE))
            for name, value in results.items():
                weight = getattr(weights, name.removeprefix("grad "), None)
                assert value.dtype == (torch.float32 if weight is None else weight.dtype), name
                floor = wide if value.dtype == torch.float32 else narrow
                compare({name: value}, theirs, truth, floor)
        call = q.on(self.DEVICE).call()
        cotangents = Cotangents(*(x[None].to(self.DEVICE) for x in (p.grad_output, p.grad_h_n)))
        with torch.no_grad():
            _, _, saved = get(self.ENGINE).forward(call, "gates")
            grads = get(self.ENGINE).backward(call, saved, "gates", cotangents, Need(True, True))
        pairs = zip(Weights.flat(grads.weights), Weights.flat(call.weights), strict=True)
        for grad, weight in pairs:
            assert grad.dtype == weight.dtype  # autograd itself would convert one that is not

    @in_every_precision
    def test_a_cell_is_a_sequence_of_one(self, precision: Precision, options: Options) -> None:
        """An engine may have a shorter way for a step without gradients."""
        options = options._replace(bidirectional=False)
        p = options.problem(self.SIZE._replace(steps=1), precision.dtype)
        narrow = p._replace(weights=p.weights.map(torch.Tensor.bfloat16))
        for operands in (p, narrow) if precision.dtype == torch.float32 else (p,):
            q = operands.on(self.DEVICE)
            cell = (q.input[0], q.context, q.weights, q.hx)
            with torch.no_grad():
                state = mcu_cell(*cell, mix=options.mix, engine=self.ENGINE)
                _, theirs = eager(self.DEVICE, precision.dtype, options.mix)(*q[:5])
            assert state.dtype == precision.dtype
            truth = reference_results(operands, options.mix)
            compare({"h_n": state}, {"h_n": theirs}, truth, precision.floor)

    @in_every_precision
    def test_a_stream_is_its_steps_to_the_bit(self, precision: Precision, options: Options) -> None:
        """An engine may read once what the steps of a stream have in common."""
        open_stream = getattr(get(self.ENGINE), "stream", None)
        if open_stream is None:
            pytest.skip("the engine has no streams")
        options = options._replace(bidirectional=False, lengths=False)
        p = options.problem(self.SIZE, precision.dtype)
        for narrow in (False, True):
            weights = p.weights.map(torch.Tensor.bfloat16) if narrow else p.weights
            q = p._replace(weights=weights).on(self.DEVICE)
            state = q.input.new_zeros(q.input.shape[1], weights.hidden_size)
            step = Step(q.input[0].clone(), q.context, q.weights, state, options.mix)
            expected = state.clone()
            try:
                stream = open_stream([step])
            except (TypeError, ValueError):  # The engine takes these by `step` alone.
                assert precision.dtype != torch.float32
                continue
            for x in q.input:
                with torch.no_grad():
                    expected = mcu_cell(
                        x, *step[1:3], expected, mix=options.mix, engine=self.ENGINE
                    )
                stream.step(x)
                assert torch.equal(state, expected)

    def test_a_retained_graph_gives_equal_bits(self, precision: Precision) -> None:
        p = problem(self.SIZE, dtype=precision.dtype).on(self.DEVICE)
        operands = [x.requires_grad_() for x in p.operands().values()]
        output, _ = helpers.run(self.ENGINE)(*p[:5])
        first, second = (
            torch.autograd.grad(
                output, operands, p.grad_output, retain_graph=True, allow_unused=True
            )
            for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("context", [True, False])
    def test_only_what_is_needed_is_computed(self, precision: Precision, context: bool) -> None:
        call, cotangents = self.call_of(2, precision, context)
        engine = get(self.ENGINE)
        keep: Keep = "gates"
        with torch.no_grad():
            _, _, saved = engine.forward(call, keep)
            whole = engine.backward(call, saved, keep, cotangents, Need(True, True))
            for need in (Need(False, True), Need(True, False), Need(False, False)):
                part = engine.backward(call, saved, keep, cotangents, need)
                assert len(part.inputs) == 2 * need.input
                assert len(part.contexts) == 2 * context
                assert len(part.weights) == 2 * need.weights
                pairs = [(part.contexts, whole.contexts), ([part.hx], [whole.hx])]
                pairs += [(part.inputs, whole.inputs)] if need.input else []
                for g in range(len(part.weights)):
                    pairs.append((part.weights[g].tensors(), whole.weights[g].tensors()))
                for ours, theirs in pairs:
                    for a, b in zip(ours, theirs, strict=True):
                        assert torch.equal(a, b), need

    @pytest.mark.parametrize("context", [True, False])
    def test_half_of_the_weight_sets_runs_in_reverse(
        self, precision: Precision, context: bool
    ) -> None:
        call, cotangents = self.call_of(4, precision, context)
        lengths = torch.randint(1, self.SIZE.steps + 1, (self.SIZE.batch,)).to(self.DEVICE)
        call = call._replace(lengths=lengths, bidirectional=True)

        def results(name: str, call: Call, cotangents: Cotangents) -> Results:
            engine = get(name)
            output, h_n, saved = engine.forward(call, "gates")
            grads = engine.backward(call, saved, "gates", cotangents, Need(True, True))
            tensors = [*grads.inputs, *grads.contexts, *Weights.flat(grads.weights), grads.hx]
            return {"output": output, "h_n": h_n} | {f"grad {i}": x for i, x in enumerate(tensors)}

        def double(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        with torch.no_grad():
            ours = results(self.ENGINE, call, cotangents)
            theirs = results("reference", call, cotangents)
            truth = results("reference", call.map(double), Cotangents(*map(double, cotangents)))
        assert ours.keys() == truth.keys()
        compare(ours, theirs, truth, precision.floor)

    def call_of(
        self, groups: int, precision: Precision, context: bool = True
    ) -> tuple[Call, Cotangents]:
        """A call of so many weight sets as the engine takes it."""
        T, B, f, c, H = self.SIZE
        sizes = [Size(T, B, f + g, c + g if context else 0, H) for g in range(groups)]
        problems = [problem(size, dtype=precision.dtype).on(self.DEVICE) for size in sizes]
        call = Call(
            [p.input for p in problems],
            [p.context for p in problems if p.context is not None],
            [p.weights for p in problems],
            torch.stack([p.hx for p in problems if p.hx is not None]),
        )
        output = torch.stack([p.grad_output for p in problems])
        return call, Cotangents(output, torch.stack([p.grad_h_n for p in problems]))

    @pytest.mark.parametrize("context", [True, False])
    def test_the_saved_size_is_what_forward_saves(
        self, precision: Precision, context: bool
    ) -> None:
        call, _ = self.call_of(3, precision, context)
        engine = get(self.ENGINE)
        keeps: tuple[Keep, ...] = ("nothing", "states", "gates")
        with torch.no_grad():
            for keep in keeps:
                output, h_n, saved = engine.forward(call, keep)
                assert output.shape == call.sizes
                assert h_n.shape == (call.sizes[0], *call.sizes[2:])
                assert output.dtype == h_n.dtype == call.dtype
                assert saved is None or saved.dtype == call.compute_dtype
                size = 0 if saved is None else saved.numel()
                assert size == engine.saved_size(call, keep)
                assert size == 0 or keep != "nothing"

    def test_nothing_is_kept_or_computed_that_nobody_asked_for(
        self, precision: Precision, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        p = problem(self.SIZE, dtype=precision.dtype).on(self.DEVICE)
        engine, asked = get(self.ENGINE), []
        prefix = "run_" if native_of(engine) else ""
        forward, backward = (getattr(engine, f"{prefix}{name}") for name in ("forward", "backward"))

        def spied_forward(call: Any, operands: Any) -> Any:
            asked.append(call.keep if prefix else operands)
            return forward(call, operands)

        def spied_backward(call: Any, *arguments: Any) -> Any:
            need = arguments[-1]
            if prefix:
                inputs, _, weights, *_ = call.form.fill(need)
                need = Need(any(inputs), any(weights))
            asked.append(need)
            return backward(call, *arguments)

        monkeypatch.setattr(engine, f"{prefix}forward", spied_forward)
        monkeypatch.setattr(engine, f"{prefix}backward", spied_backward)
        hx = p.hx[None]
        without, _ = mcu(*p[:3], hx, engine=self.ENGINE)
        context = p.context.clone().requires_grad_()
        output, _ = mcu(p.input, context, p.weights, hx, engine=self.ENGINE)
        output.sum().backward()
        recomputed, _ = mcu(p.input, context, p.weights, hx, engine=self.ENGINE, recompute=True)
        assert asked == ["nothing", "gates", Need(False, False), "states"]
        assert torch.equal(without, output)
        assert torch.equal(without, recomputed)
        with torch.no_grad():
            mcu(p.input, context, p.weights, hx, engine=self.ENGINE)
        assert asked[-1] == "nothing"
