"""The C++ engine against the float64 reference."""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
from contract import PRECISIONS, Contract
from helpers import ODD_SIZES, Size, problem, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from mmixer_kernels import _native, reference
from mmixer_kernels.engines import cpu
from mmixer_kernels.functional import mcu, mcu_group
from mmixer_kernels.problem import Problem, Step

run = partial(helpers.run, "cpu")
INSTRUCTION_SETS = _native.build_info()["instruction_sets_here"]


@contextmanager
def instructions(name):
    default = _native.build_info()["instruction_set"]
    _native.use_instruction_set(name)
    yield name
    _native.use_instruction_set(default)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    with instructions(request.param):
        yield request.param


class TestContract(Contract):
    ENGINE = "cpu"
    PAIRS = tuple((name, x) for name in INSTRUCTION_SETS for x in PRECISIONS if x != "float32-high")
    OTHERS = tuple((name, "float32") for name in INSTRUCTION_SETS)
    SIZES = (*Contract.SIZES, Size(6, 30, 13, 7, 96))
    LARGE = Size(32, 8, 256, 256, 256)

    def entered(self, way, precision):
        return instructions(way)


def every_option(test):
    """test(dtype, mix, layer_norm, lengths) with each value of each."""
    for name, values in {
        "lengths": [False, True],
        "layer_norm": [True, False],
        "mix": ["gated", "concat"],
        "dtype": [torch.float64, torch.float32],
    }.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tensors_are_computed_in_float32(dtype):
    p = problem(Size(9, 3, 6, 5, 24), dtype=dtype)
    results = with_gradients(run(), p)
    exact = with_gradients(run(), p.to(torch.float32))
    half_ulp = 1.01 * torch.finfo(dtype).eps / 2
    for name, value in results.items():
        assert value.dtype == dtype, name
        assert ((value.float() - exact[name]).abs() <= half_ulp * exact[name].abs() + 1e-7).all()


def test_a_sample_does_not_depend_on_its_batch(instruction_set, threads):
    """A sample has equal bits alone, among others, elsewhere, with any number of threads."""
    p = problem(Size(6, 19, 13, 7, 45), dtype=torch.float32)
    lengths = torch.randint(1, 7, (19,))
    p = p._replace(lengths=lengths)
    torch.set_num_threads(1)
    whole = with_gradients(run(), p)
    per_sample = ["output", "h_n", "grad input", "grad context", "grad hx"]

    def select(samples):
        return p._replace(
            input=p.input[:, samples],
            context=p.context[samples],
            hx=p.hx[samples],
            lengths=lengths[samples],
            grad_output=p.grad_output[:, samples],
            grad_h_n=p.grad_h_n[samples],
        )

    for threads_used in (1, 2, 3):
        torch.set_num_threads(threads_used)
        for samples in ([4], [4, 0], list(range(18, -1, -1)), [7, 4, 1, 2, 3]):
            part = with_gradients(run(), select(samples))
            for name in per_sample:
                dim = 0 if whole[name].ndim == 2 else 1
                expected = whole[name].index_select(dim, torch.tensor(samples))
                assert torch.equal(part[name], expected), (name, samples, threads_used)


def test_threads_do_not_change_a_bit(instruction_set, threads):
    for size in (Size(9, 40, 20, 11, 128), Size(5, 2, 64, 64, 192), Size(1, 1, 256, 256, 256)):
        p = problem(size, dtype=torch.float32)
        torch.set_num_threads(1)
        alone = with_gradients(run(), p)
        for count in (2, 5):
            torch.set_num_threads(count)
            team = with_gradients(run(), p)
            for name, value in alone.items():
                assert torch.equal(team[name], value), (size, name, count)


class Copies(TorchDispatchMode):
    """The shapes of what PyTorch copies or converts meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone):
            self.shapes.append(tuple(result.shape))
        return result


def copied(x, context, weights):
    with Copies() as copies:
        cpu.forward(Problem([x], [context], [weights]), "nothing")
    return copies.shapes


def test_rows_and_batches_of_input_are_read_in_place():
    """A batch-first float32 input with a row stride is not copied; one with another stride is."""
    wide, context, weights = torch.randn(3, 8, 12), torch.randn(3, 4), _weights(6, 4, 5)
    assert copied(wide[..., :6].transpose(0, 1), context, weights) == []
    assert copied(wide[..., ::2].transpose(0, 1), context, weights) == [(8, 3, 6)]


def test_a_tensor_that_is_negated_in_place_of_its_values():
    """Torch keeps the sign of a conjugate's imaginary part in a bit beside the memory."""
    values = torch.randn(4, 3, 1, dtype=torch.complex64)
    x, context, weights = values.conj().imag, torch.randn(3, 2), _weights(1, 2, 7)
    assert x.is_neg()
    with torch.no_grad():
        output, _ = mcu(x, context, weights, engine="cpu")
        expected, _ = mcu(x.clone(), context, weights, engine="cpu")
    assert torch.equal(output, expected)


def test_group_is_its_members():
    """G weight sets of other sizes give, in one call, the bits of G calls."""
    sizes = [(6, 9), (17, 3), (1, 30)]
    steps, batch, hidden = 5, 11, 37
    inputs = [torch.randn(steps, batch, f) for f, _ in sizes]
    contexts = [torch.randn(batch, c) for _, c in sizes]
    weights = [_weights(f, c, hidden) for f, c in sizes]
    hx, lengths = torch.randn(3, batch, hidden), torch.randint(1, 6, (batch,))
    leaves = [*inputs, *contexts, *(x for w in weights for x in w), hx]
    for leaf in leaves:
        leaf.requires_grad_()
    output, h_n = mcu_group(inputs, contexts, weights, hx, lengths, engine="cpu")
    grad_output, grad_h_n = torch.randn_like(output), torch.randn_like(h_n)
    grads = torch.autograd.grad((output, h_n), leaves, (grad_output, grad_h_n))

    alone = [
        mcu(inputs[g], contexts[g], weights[g], hx[g : g + 1], lengths, engine="cpu")
        for g in range(3)
    ]
    for g, (output_g, h_n_g) in enumerate(alone):
        assert torch.equal(output[g], output_g)
        assert torch.equal(h_n[g], h_n_g[0])
    expected = torch.autograd.grad(
        [x for pair in alone for x in pair],
        leaves,
        [x for g in range(3) for x in (grad_output[g], grad_h_n[g : g + 1])],
    )
    for grad, single in zip(grads, expected, strict=True):
        assert torch.equal(grad, single)


@pytest.mark.parametrize("without_context", [False, True])
def test_a_direction_is_a_call_of_its_own(instruction_set, threads, without_context):
    """Both directions in one call give the bits of two, the second on the samples' steps in
    reverse."""
    torch.set_num_threads(2)
    size = Size(5, 9, 20, 0 if without_context else 11, 128)
    p = problem(size, lengths=True, bidirectional=True, dtype=torch.float32)
    both = with_gradients(run(), p)
    steps, H = torch.arange(size.steps)[:, None], size.hidden
    turned = torch.where(steps < p.lengths, p.lengths - 1 - steps, steps)[..., None]

    def turn(x):
        return x.gather(0, turned.expand_as(x))

    def direction(d, weights, turn):
        parts = {"grad_output": turn(p.grad_output.split(H, -1)[d]), "grad_h_n": p.grad_h_n[d]}
        parts |= {"input": turn(p.input), "hx": p.hx[d], "weights": weights}
        return with_gradients(run(), p._replace(weights_reverse=None, **parts))

    first = direction(0, p.weights, lambda x: x)
    second = direction(1, p.weights_reverse, turn)
    for d, (name, one) in enumerate({"": first, "_reverse": second}.items()):
        assert torch.equal(both["h_n"][d], one["h_n"])
        assert torch.equal(both["grad hx"][d], one["grad hx"])
        for weight in p.weights._asdict():
            if f"grad {weight}" in one:
                assert torch.equal(both[f"grad {weight}{name}"], one[f"grad {weight}"]), weight
    output = torch.cat([first["output"], turn(second["output"])], -1)
    assert torch.equal(both["output"], output)
    assert torch.equal(both["grad input"], first["grad input"] + turn(second["grad input"]))


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 5, 17), (3, 8, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", ["states", "gates"])
@pytest.mark.parametrize("context_size", [2, 0])
def test_forward_writes_all_that_is_saved_and_no_more(size, dtype, keep, context_size, monkeypatch):
    groups, steps, batch, hidden = size
    inputs = [torch.randn(steps, batch, 3, dtype=dtype)] * groups
    contexts = [torch.randn(batch, 2, dtype=dtype)] * groups if context_size else []
    weights = [_weights(3, context_size, hidden).map(lambda x: x.to(dtype))] * groups
    call = Problem(inputs, contexts, weights)
    size = cpu.saved_size(call, keep)
    longer = SimpleNamespace(**vars(_native))
    longer.saved_size = lambda problem: _native.saved_size(problem=problem) + 64
    monkeypatch.setattr(cpu, "_native", longer)
    _, _, saved = cpu.forward(call, keep)
    assert saved[:size].isfinite().all()
    assert saved[size:].isnan().all()  # what torch fills new memory with in tests


@every_option
def test_recompute_gives_the_same_bits(instruction_set, dtype, mix, layer_norm, lengths):
    for size in [*ODD_SIZES, Size(6, 30, 13, 7, 96), Size(6, 30, 13, 0, 96)]:
        p = problem(size, layer_norm=layer_norm, lengths=lengths, dtype=dtype)
        expected = with_gradients(run(mix), p)
        for name, value in with_gradients(run(mix, recompute=True), p).items():
            assert torch.equal(value, expected[name]), (size, name)


@pytest.mark.parametrize("steps", [1, 4])
def test_bfloat16_weights_are_not_copied(steps):
    x, context = torch.randn(steps, 3, 6), torch.randn(3, 4)
    weights = _weights(6, 4, 5).map(torch.Tensor.bfloat16)
    assert copied(x, context, weights) == []
    mixed = weights._replace(weight_h=weights.weight_h.float())
    assert copied(x, context, mixed) == [(5, 6), (5, 4), (5, 10), (5, 5), (5, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["gated", "concat"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_step_is_a_sequence_of_one(instruction_set, threads, dtype, mix, layer_norm):
    without_context = [Size(1, 1, 1, 0, 1), Size(3, 2, 3, 0, 33)]
    for size in [*ODD_SIZES, *without_context]:
        p = problem(size, layer_norm=layer_norm, dtype=dtype)
        input = torch.stack([p.input[0]] * 2, dim=-1)[..., 0]  # strided
        for hx in (None, p.hx):
            for count in (1, 2):
                torch.set_num_threads(count)
                step = cpu.step(Step(input, p.context, p.weights, hx, mix))
                call = p._replace(input=p.input[:1], hx=hx).call(mix)
                output, h_n, _ = cpu.forward(call, "nothing")
                assert step.dtype == dtype
                assert torch.equal(step, h_n[0])
                assert torch.equal(step, output[0, 0])


def test_saved_memory_is_at_most_that_of_gru():
    """The bytes are those that autograd keeps of a training step, inputs and parameters aside."""

    def kept(function, operands):
        storages = {}
        own = {x.untyped_storage().data_ptr() for x in operands}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = function()
        del result
        return sum(storages.values())

    steps, batch, hidden = 64, 8, 512
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    context, weights = torch.randn(batch, hidden), _weights(hidden, hidden, hidden)
    for weight in weights:
        weight.requires_grad_()
    gru = torch.nn.GRU(hidden, hidden)
    operands = [x, context, *weights]
    ours = kept(lambda: mcu(x, context, weights, engine="cpu"), operands)
    least = kept(lambda: mcu(x, context, weights, engine="cpu", recompute=True), operands)
    assert least == x.untyped_storage().nbytes()  # the states, T B H of them
    theirs = kept(lambda: gru(x), [x, *gru.parameters()])
    assert ours <= theirs


def test_more_threads_than_processors(threads):
    p = problem(Size(3, 9, 20, 11, 128), dtype=torch.float32)
    expected = with_gradients(run(), p)
    torch.set_num_threads(16)
    for name, value in with_gradients(run(), p).items():
        assert torch.equal(value, expected[name]), name


_OPENMP = """
import os, re, torch

def loaded():
    with open("/proc/self/maps") as maps:
        runtimes = set(re.findall(r"/\\S*lib(?:g|i|)omp\\S*", maps.read()))
    return runtimes, len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
torch.rand(1 << 20).sin()
of_torch = loaded()
from mmixer_kernels import FusedMCU
FusedMCU(256, 0, 256, engine="cpu")(torch.rand(8, 4, 256))
print(of_torch, loaded(), sep="\\n")
"""


@pytest.mark.skipif(not _native.build_info()["openmp"], reason="a build without OpenMP")
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_threads_are_those_of_torch(tmp_path):
    """No other OpenMP runtime comes into the process, and no thread."""
    command = [sys.executable, "-c", _OPENMP]
    # Elsewhere than in the checkout, whose extension need not be the one under test.
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    of_torch, with_ours = result.stdout.splitlines()
    assert of_torch != "(set(), 1)"
    assert with_ours == of_torch


def test_calls_from_several_python_threads(threads):
    """Calls of two sizes: each thread keeps the memory that its largest call worked in."""
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(2)
    sizes = Size(5, 9, 20, 11, 128), Size(3, 2, 20, 11, 31)
    problems = [problem(size, dtype=torch.float32) for size in sizes]
    expected = [with_gradients(run(), p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: with_gradients(run(), problems[i % 2]), range(12))
        for i, results in enumerate(found):
            for name, value in results.items():
                assert torch.equal(value, expected[i % 2][name]), name


_FAULTS = """
import resource, torch
from mmixer_kernels import FusedMCU

def faults(steps):
    unit, sequence = FusedMCU(256, 0, 256, engine="cpu"), torch.rand(steps, 8, 256)
    with torch.no_grad():
        unit(sequence)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            unit(sequence)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

print(faults(16), faults(4096))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told to keep no memory")
def test_the_memory_of_a_call_is_kept_up_to_a_limit(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _FAULTS]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    of_short, of_long = map(float, result.stdout.split())
    page, results = os.sysconf("SC_PAGE_SIZE"), 16 * 8 * 256 * 4
    workspace = 4 * 256 * 256 * 4  # the packed weights alone
    assert of_short < (results + workspace / 4) / page
    assert of_long > 4096 * 8 * 256 * 4 / page  # results, and a workspace beyond the limit


def test_lengths_are_checked_where_the_values_are():
    p = problem(Size(3, 2, 4, 5, 6), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.3"):
        cpu.forward(p._replace(lengths=torch.tensor([0, 3])).call(), "nothing")


def _weights(input_size, context_size, hidden):
    unit = reference.MCU(input_size, context_size, hidden)
    return unit.weights().map(torch.Tensor.detach)


def test_the_way_of_a_call_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(
        cpu._native, "build_info", lambda: {"instruction_set": "x", "processors": 3}
    )
    monkeypatch.setattr(
        cpu._native,
        "team_size",
        lambda multiplications, threads: max(1, min(multiplications // 32768, threads, 3)),
    )

    def path(size, dtype=torch.float32, backward=False):
        return cpu.path(problem(size, dtype=dtype).call(), backward)

    packed = "weights packed at the call's begin, for all of its steps"
    assert path(Size(2, 8, 4, 4, 128)) == (
        f"x, 3 threads of torch's 4, one per processor, {packed}"
    )
    assert path(Size(2, 1, 4, 4, 256)) == (
        "x, 2 threads of torch's 4, as a step's product has 65536 multiplications and a thread "
        f"takes 32768 at least, {packed}"
    )
    assert path(Size(2, 1, 4, 4, 64)).startswith("x, 1 thread of torch's 4")
    assert path(Size(1, 1, 4, 4, 64)).endswith("weights read where they lie, once each")
    assert path(Size(1, 1, 4, 4, 64), backward=True).endswith("or packed where that is faster")
    assert path(Size(2, 1, 4, 4, 64), torch.float16).endswith("float16 computed in float32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert path(Size(2, 8, 4, 4, 128)) == f"x, 1 thread, {packed}"
