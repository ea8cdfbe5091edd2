"""The timing and records of the benchmarks; a rehearsal of the GPU's benchmarks without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import clocks
import gpu_table
import limits
import onednn
import primitives
import problems
import report
from clocks import HostSeconds

from mmixer_kernels import reference
from mmixer_kernels.comparison.timing import Contender, Ratio
from mmixer_kernels.problem import Call, Form, Problem, Weights

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


class Cuda:
    """torch.cuda, as far as the clock needs it: time passes in what is called."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.wakes = 0.0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleEvent(self))

    def sleep(self, cycles):
        self.wakes = self.now + cycles / 2e9


class SimpleEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.time = self.cuda.now

    def query(self):
        return self.cuda.now >= self.cuda.wakes

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def test_a_time_on_the_gpu_is_the_hosts_where_the_gpu_woke_first(monkeypatch):
    cuda = Cuda(monkeypatch)
    head_start = 20_000_000  # 10 ms

    def takes(seconds):
        def call():
            cuda.now += seconds

        return call

    for seconds, late in ((0.009, False), (0.011, True)):
        measured = clocks.cuda_seconds(takes(seconds), head_start)
        assert measured == pytest.approx(seconds)
        assert isinstance(measured, HostSeconds) is late
    assert not isinstance(clocks.cuda_seconds(takes(1.0)), HostSeconds)  # the caller's view


def test_the_hosts_part_of_a_call_ends_where_it_returns(monkeypatch):
    cuda = Cuda(monkeypatch)

    def call():
        cuda.now += 1.0
        time.sleep(0.01)

    measured = clocks.call_seconds(call)
    assert measured == 1.0
    assert 0.01 <= measured.host < 0.5
    (median,) = clocks.host_seconds({"ours": [measured] * 3}).values()
    assert median == measured.host


def test_more_than_half_of_the_rounds_make_a_median_the_hosts():
    late, asleep = HostSeconds(1.0), 1.0
    times = {
        "none": [asleep] * 4,
        "half": [late, late, asleep, asleep],
        "most": [late, asleep, late, late],
    }
    assert clocks.by_host(times) == ["most"]


def test_the_processors_time_is_that_of_a_call(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def call():
        now[0] += 0.25

    assert clocks.processor_seconds(call) == 0.25
    assert now[0] == 5 + 0.25 * clocks.CALLS


class Profile:
    """torch.profiler.profile that saw so many events."""

    def __init__(self, *events):
        self.seen = [SimpleNamespace(name=name, device_type=device) for name, device in events]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        return self.seen


def test_kernels_are_counted_by_name(monkeypatch):
    cuda, cpu = torch.profiler.DeviceType.CUDA, torch.profiler.DeviceType.CPU
    profile = Profile(("gemm", cuda), ("aten::mm", cpu), ("gru", cuda), ("gemm", cuda))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    assert clocks.kernels(lambda: None) == {"gemm": 2, "gru": 1}
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile(("aten::mm", cpu)))
    with pytest.raises(RuntimeError, match="saw nothing"):
        clocks.kernels(lambda: None)


class Benchmark:
    """pytest-benchmark's fixture."""

    disabled = False

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, call, **_):
        call()


@pytest.fixture
def fixtures(tmp_path):
    """benchmarks/conftest.py, and a request with its options."""
    path = BENCHMARKS / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest_of_the_benchmarks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"results": tmp_path / "results.json", "budget": 0.0}
    config = SimpleNamespace(
        stash=pytest.Stash(), getoption=options.__getitem__, results=options["results"]
    )
    config.stash[module.COMPARISONS] = []
    config.stash[module.LOAD] = 0.5
    config.stash[module.FACTS] = {"commit": "abc"}
    return module, SimpleNamespace(config=config)


def read(request):
    (comparison,) = json.loads(request.config.results.read_text())["comparisons"]
    ratios = {name: Ratio(**ratio) for name, ratio in comparison["ratios"].items()}
    return report.Comparison(**{**comparison, "ratios": ratios})


def test_a_comparison_on_a_gpu_is_written_as_it_is(fixtures, monkeypatch):
    module, request = fixtures
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)

    def takes(name, seconds):
        def call():
            cuda.now += seconds

        return Contender(name, call)

    compare = module.compare_on_gpu._get_wrapped_function()(Benchmark(), request)
    compare(
        "table",
        "64x8x512",
        [takes("ours", 0.001), takes("late", 0.1), takes("eager", 0.004)],
        error=1e-3,
        settings={"kind": "sequence"},
        on_gpu=["ours", "late"],
        missing={"other": "not here"},
    )
    (comparison,) = request.config.stash[module.COMPARISONS]
    assert comparison == read(request)
    assert comparison.by_host == ["late"]
    assert comparison.ratios["eager"] == pytest.approx((0.25,) * 3)
    assert comparison.seconds["call"] == pytest.approx({"ours": 1e-3, "late": 0.1, "eager": 4e-3})
    assert comparison.seconds["GPU"] == pytest.approx({"ours": 1e-3, "late": 0.1})
    assert comparison.missing == {"other": "not here"}
    # The clock of the made-up GPU stands still for the host's.
    assert list(comparison.seconds["host"]) == ["ours", "late", "eager"]
    assert max(comparison.seconds["host"].values()) < 1e-3


def test_a_comparison_on_the_host_counts_after_it_has_timed(fixtures, monkeypatch):
    module, request = fixtures
    times, calls = {"ours": 2.0, "GRU": 4.0}, []
    monkeypatch.setattr(clocks, "processor_seconds", lambda call: times[call()])

    def contender(name):
        return Contender(name, lambda: calls.append(name) or name)

    def kernels():
        calls.append("count")
        return {"ours": {"Forward": 1, "product": 5}}

    compare = module.compare_on_host._get_wrapped_function()(Benchmark(), request)
    compare("table", "case", [contender(x) for x in times], error=0.0, kernels=kernels)
    comparison = read(request)
    assert calls[-1] == "count"
    assert calls.count("count") == 1
    assert comparison.ratios == {"GRU": (0.5, 0.5, 0.5)}
    assert comparison.seconds == {"processor": times}
    assert comparison.shares == {"started by ours": "6"}


def test_a_profiler_that_refuses_is_told_and_no_more(fixtures, monkeypatch):
    module, request = fixtures
    names = {"gemm": 3}

    def kernels(call):
        if call() == "refused":
            raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
        return names

    monkeypatch.setattr(clocks, "kernels", kernels)
    count = module.count_kernels._get_wrapped_function()(Benchmark(), request)
    contenders = [Contender("nn.GRU", lambda: "refused"), Contender("nn.LSTM", lambda: "")]
    count("Kernels", "64x8x512", contenders, settings={"kind": "kernels"})
    comparison = read(request)
    assert comparison.kernels == {"nn.LSTM": names}
    assert comparison.missing == {
        "kernels of nn.GRU": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    }
    text = gpu_table.text({"results": {"x": json.loads(request.config.results.read_text())}})
    assert "CUPTI_ERROR" in text


def test_results_are_written_after_each_comparison(fixtures):
    module, request = fixtures
    benchmark = Benchmark()
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0] * 5))

    def pedantic(call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()

    benchmark.pedantic = pedantic
    compare = module.compare._get_wrapped_function()(benchmark, request)
    contenders = [Contender("ours", lambda: None), Contender("theirs", lambda: time.sleep(1e-3))]
    missing = {"compiled": "TimeoutError: not done in 1 s"}
    compare("table", "case", contenders, threads=1, error=0.0, missing=missing)
    comparison = read(request)
    assert comparison.missing == missing
    assert comparison.ratios["theirs"].of_medians > 1
    assert "theirs" in report.tables([comparison])


def test_a_table_names_multiply_adds_and_what_is_missing():
    comparison = report.Comparison("Table", "64x8x512", 1, 1e-6, 5)
    comparison.ratios = {"GRU": Ratio(0.8, 0.7, 0.9)}
    comparison.multiply_adds = {"ours": 5 + 2 / 64, "GRU": 6.0, "LSTM": 8.0}
    comparison.missing = {"LSTM": "pip install it"}
    assert [" ".join(line.split()) for line in report.tables([comparison]).splitlines()] == [
        "Table",
        "case threads multiply-adds GRU [6] error rounds",
        "64x8x512 1 [5.03] 0.80 (0.70-0.90) 1e-06 5",
        "[multiply-adds of a forward's row, in units of H^2]",
        "no LSTM: pip install it",
    ]


@pytest.mark.parametrize(
    ("kind", "module", "order"),
    [
        (primitives.LBR_GRU, torch.nn.GRU, (1, 0, 2)),
        (primitives.LSTM, torch.nn.LSTM, (0, 1, 2, 3)),
    ],
)
def test_the_equations_are_those_of_torchs_layers(kind, module, order):
    size = problems.Size(4, 3, 5)
    operands = {name: x.double() for name, x in primitives.draw(kind, size).items()}
    layer = module(5, 5, dtype=torch.float64)
    bias = operands["bias"][0, 0]
    recurrent = torch.zeros(len(order), 5).double()
    recurrent[len(order) - len(bias[len(order) :]) :] = bias[len(order) :]
    weights = [operands[name][0, 0].permute(1, 2, 0) for name in onednn.WEIGHTS]
    with torch.no_grad():
        for parameter, x in zip(
            layer.parameters(), (*weights, bias[: len(order)], recurrent), strict=True
        ):
            parameter.copy_(x[list(order)].reshape(parameter.shape))
    states = [x[0] for name, x in operands.items() if "iter" in name and "src" in name]
    output, _ = layer(operands["src_layer"], states[0] if len(states) == 1 else tuple(states))
    torch.testing.assert_close(primitives.truth(kind, operands)["dst_layer"], output)


@pytest.mark.parametrize("name", primitives.ONEDNN | primitives.ONNX)
def test_a_primitive_that_leaves_something_out_is_no_baseline(name, monkeypatch):
    kind, make = (primitives.ONEDNN | primitives.ONNX)[name]
    try:
        layer = make(kind, primitives.draw(kind, problems.Size(3, 2, 16)))
    except ImportError as problem:
        pytest.skip(str(problem))
    assert primitives.check(kind, layer) < 1e-5
    if name in primitives.ONEDNN:
        assert set(layer.gradients["dst_layer"].unique().tolist()) == {1.0}
        # The last one brings the gradient of a weight into the operand's layout.
        monkeypatch.setattr(layer, "_steps", layer._steps[:-1])
        layer.gradients["weights_iter"].zero_()
        with pytest.raises(AssertionError, match="gradient of weights_iter"):
            primitives.check(kind, layer)
    monkeypatch.setattr(layer, "forward", lambda: None)
    with pytest.raises(AssertionError, match="dst_iter of forward"):
        primitives.check(kind, layer)


def test_what_does_not_run_or_end_is_left_out_with_its_reason():
    contenders, missing = [], {}

    def fails(name):
        raise ImportError("no such\n thing")

    def add(name, make, limit=60):
        clocks.add_if_it_runs(contenders, missing, name, make, CPU, limit)

    add("fails", fails)
    add("hangs", lambda name: Contender(name, lambda: time.sleep(30)), limit=1)
    add("runs", lambda name: Contender(name, lambda: None))
    assert missing == {
        "fails": "ImportError: no such thing",
        "hangs": "TimeoutError: not done in 1 s",
    }
    assert [x.name for x in contenders] == ["runs"]


REHEARSAL = '''
"""A plugin of pytest: the benchmarks of a GPU on a CPU, at small sizes, by the reference engine,
and on a machine that has little installed. Path "step" is always late."""

import sys
import time

for name in ("tyro", "av", "seglearn", "matplotlib", "tqdm", "torchvision", "onnx"):
    sys.modules[name] = None

import pytest
import torch

import mmixer_kernels
from mmixer_kernels import EngineState, functional
from mmixer_kernels.engines import cuda, triton

CPU = torch.device("cpu")
NEXT = {64: 3, 1024: 5, 9: 3, 13: 4, 512: 8, 768: 9, 128: 8, 256: 8, 16: 3, 32: 3, 8: 2}


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.time = time.perf_counter()

    def query(self):
        return cuda.PATHS == ("step",)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def by_the_reference(function):
    def call(*args, engine, **more):
        return function(*args, engine=engine if engine == "auto" else "reference", **more)

    return call


torch.cuda.Event = Event
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
torch.cuda._sleep = lambda cycles: None
torch.cuda.current_device = lambda: 0
torch.cuda.is_available = lambda: True
torch.accelerator.synchronize = lambda device: None
functional.mcu_group = by_the_reference(functional.mcu_group)
for name in ("FusedMCU", "FusedMCUCell", "FusedMCUStack", "MMixer"):
    setattr(mmixer_kernels, name, by_the_reference(getattr(mmixer_kernels, name)))
mmixer_kernels.engines = lambda: {
    name: EngineState(name != "cpu", "rehearsed") for name in ("cpu", "cuda", "triton")
}
cuda.PATHS = ("cooperative", "wide", "step")
cuda._native_plan = lambda *_: (8, 1, "")
cuda.state = triton.state = lambda *_: EngineState(True, "rehearsed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    import report

    report.gpu = lambda: {"name": "rehearsed"}
    for item in items:
        module = item.module
        module.GPU = module.DEVICE = CPU
        module.HIDDEN = module.FEATURES = 8
        module.BATCH, module.LENGTHS = 2, (3, 5)
        module.WIDE_HIDDEN, module.WIDE_BATCH = 9, 3
        module.TOLERANCE = 1.0
        if hasattr(module, "PRECISIONS"):
            for name, chosen in module.PRECISIONS.items():
                module.PRECISIONS[name] = chosen._replace(tolerance=1.0)
        for name, value in item.callspec.params.items():
            if name in ("steps", "hidden", "batch"):
                item.callspec.params[name] = NEXT.get(value, value)
            if name == "size":
                item.callspec.params[name] = type(value)(3, 2, 8)
'''


def run_benchmarks(folder, *words):
    """The results that benchmarks write, and the text that pytest prints; few rounds of each."""
    results = folder / "results.json"
    # pytest-benchmark does not measure where it finds what pytest-xdist tells its workers.
    environment = {name: x for name, x in os.environ.items() if "PYTEST_XDIST" not in name}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-v"),
            *("--benchmark-only", "--budget", "0", "--results", str(results), *words),
        ],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(results.read_text()), run.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "rehearsal.py").write_text(REHEARSAL)
    files = ["engines/bench_cuda.py", "engines/bench_triton.py", "bench_network.py"]
    words = "-p", "rehearsal", "-k", "not compiled and not prologue"
    return run_benchmarks(folder, *words, *(str(BENCHMARKS / file) for file in files))


@pytest.mark.slow
def test_every_benchmark_of_a_gpu_runs_to_its_end(rehearsal):
    document, _ = rehearsal
    assert document["failed"] == []
    kinds = Counter(x["settings"].get("kind", "network") for x in document["comparisons"])
    assert kinds["sequence"] == 16 + 8 + 28  # test_sequence, test_wide, test_size
    assert (kinds["paper"], kinds["paths"], kinds["group"]) == (12, 4, 4)
    assert (kinds["samples"], kinds["packets"], kinds["stack"]) == (4, 4, 4)
    assert (kinds["kernels"], kinds["network kernels"], kinds["network"]) == (16, 4, 4)
    assert (kinds["triton"], kinds["cell, cuda"], kinds["cell, triton"]) == (10, 2, 2)


@pytest.mark.slow
def test_what_the_rehearsed_benchmarks_record(rehearsal):
    comparisons = rehearsal[0]["comparisons"]
    paths = [x for x in comparisons if x["settings"].get("kind") == "paths"]
    for row in paths:
        assert row["missing"] == {"cluster": "MMIXER_CUDA_PATHS does not name it"}
        assert row["by_host"] == ["step"]
    for kind, names in (
        ("samples", ["teams of 4", "teams of 8"]),
        ("packets", ["wide", "cooperative"]),
    ):
        for row in (x for x in comparisons if x["settings"].get("kind") == kind):
            assert list(row["seconds"]["GPU"]) == names
            assert row["settings"]["ours"] == names[0]
    paper = [x for x in comparisons if x["settings"].get("kind") == "paper"]
    assert {x["settings"]["modalities"] for x in paper} == {1, 2, 3}
    assert all({*x["seconds"]["GPU"]} == {"mcu_group", "nn.GRU", "nn.LSTM"} for x in paper)
    for row in (x for x in comparisons if x["settings"].get("kind") == "kernels"):
        ours = "mcu_group" if "modalities" in row["settings"] else "FusedMCU"
        # there is no GPU for the profiler to look at
        assert [*row["missing"]] == [f"kernels of {x}" for x in (ours, "nn.GRU", "nn.LSTM")]


@pytest.mark.slow
def test_the_table_of_the_rehearsed_benchmarks(rehearsal):
    text = gpu_table.text({"results": {"rehearsal": rehearsal[0]}})
    assert "rehearsed" in text
    assert "the slope between the lengths" in text
    assert "cluster: MMIXER_CUDA_PATHS does not name it" in text
    assert "step host" in text
    assert "M-Mixer, N = 3, engine cuda" in text


@pytest.mark.slow
def test_what_matters_most_is_measured_first(rehearsal):
    seen = [
        x.split("::")[1].split("[")[0].split()[0] for x in rehearsal[1].splitlines() if "::" in x
    ]
    of_cuda = list(dict.fromkeys(seen))[:11]
    assert of_cuda == [
        *("test_sequence", "test_group", "test_path", "test_paper", "test_wide"),
        *("test_kernels_of_sequence", "test_kernels_of_paper"),
        *("test_samples", "test_packets", "test_stack", "test_size"),
    ]
    words = ("sequence", "wide", "paper", "path", "group", "samples", "packets", "stack")
    for name in of_cuda:
        assert sum(word in name for word in words) == (name != "test_size")
    precisions = [x["settings"]["precision"] for x in rehearsal[0]["comparisons"][:16]]
    changes = [a for a, b in pairwise([*precisions, ""]) if a != b]
    assert changes == ["bfloat16", "float16", "float32-high", "float32"]


@pytest.mark.slow
def test_the_hosts_benchmarks_count_what_they_do_not_run(tmp_path):
    pytest.importorskip("pybind11")
    document, _ = run_benchmarks(tmp_path, str(BENCHMARKS / "bench_host.py"))
    assert document["failed"] == []
    rows = document["comparisons"]
    assert Counter(x["table"].split(", ")[1] for x in rows) == {"engine cuda": 15, "engine cpu": 9}
    for row in rows:
        names = list(row["seconds"]["processor"])
        assert list(row["ratios"]) == names[1:]
        assert any(name.startswith("nn.GRU") for name in names)
        assert row["error"] < 5e-2
        ours = [name for name in names if "engine cuda" in row["table"] and "nn." not in name]
        assert list(row["kernels"]) == ours
        for kernels in row["kernels"].values():
            assert kernels["Forward"] == 1
            assert kernels.get("Backward", 0) == ("backward" in row["table"])


WITHOUT_RUNTIMES = """
import sys
from importlib import metadata

def files(name):
    raise metadata.PackageNotFoundError(name)

metadata.files = files
sys.modules["onnxruntime"] = None
"""


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["", WITHOUT_RUNTIMES])
def test_the_primitives_are_baselines_where_they_are_installed(tmp_path, plugin):
    (tmp_path / "plugin.py").write_text(plugin)
    words = "-p", "plugin", "-k", "1-thread and 64x8x32", str(BENCHMARKS / "bench_primitives.py")
    document, text = run_benchmarks(tmp_path, *words)
    assert document["failed"] == []
    assert len(document["comparisons"]) == 2
    for row in document["comparisons"]:
        others = primitives.BASELINES[row["table"].split(", ")[1]]
        assert row["multiply_adds"]["FusedMCU"] == 5 + 2 / 64
        assert set(row["ratios"]) <= set(row["multiply_adds"])
        assert {*row["ratios"], *row["missing"]} == {"nn.GRU", "nn.LSTM", *others}
        assert set(others) == set(row["missing"]) or not plugin
    if plugin:
        assert "no oneDNN GRU: " in text
        assert "pip install onednn-cpu-gomp" in text
        assert "pip install onnx onnxruntime" in text


@pytest.mark.slow
def test_limits():
    """The roofline's measurements are sound: operations count for the whole team, reading stays
    inside the block, and the recurrence takes a part of the call's time."""
    pytest.importorskip("pybind11")
    cpu = pytest.importorskip("mmixer_kernels.engines.cpu")
    machine = limits.module()
    for threads in (1, 2):
        counts = [machine.multiply_add(rounds, threads) for rounds in (1, 10)]
        assert counts[0] > 0
        assert counts[1] == 10 * counts[0]
        assert counts[0] == threads * machine.multiply_add(1, 1)
        block = torch.randn(1001)
        machine.read(block.data_ptr(), block.numel(), 3, threads)
    weights = Weights(*(x.detach() for x in reference.MCU(6, 4, 64).weights()))
    problem = Problem([torch.randn(40, 3, 6)], [torch.randn(3, 4)], [weights])
    call, tensors = Call(Form.of(problem.flat()), "nothing"), problem.tensors()
    output = torch.empty(40, 3, 64)
    start = time.perf_counter()
    seconds = machine.recurrence_seconds(call=call, tensors=tensors, threads=1, output=output)
    assert 0 < seconds < time.perf_counter() - start
    assert torch.equal(output, cpu.forward(problem, "nothing")[0][0])


def test_slow_downs_are_each_contenders_against_itself(fixtures):
    module, request = fixtures
    base = {"ours": 1.0, "theirs": 2.0}
    factor = {"nothing": 1.0, "much": 3.0}
    seen = []

    def clock(contender, beside):
        seen.append((contender.name, beside))
        return base[contender.name] * factor[beside]

    compare = module.compare_slow_downs._get_wrapped_function()(Benchmark(), request)
    contenders = [Contender(name, lambda: None) for name in base]
    compare("table", contenders, threads=2, error=0.0, beside=list(factor), clock=clock)
    nothing, much = request.config.stash[module.COMPARISONS]
    assert {*seen} == {(name, beside) for name in base for beside in factor}
    assert nothing.ratios == {name: (1.0, 1.0, 1.0) for name in base}
    assert much.ratios == {name: (3.0, 3.0, 3.0) for name in base}
    assert much.seconds == {"call": {"ours": 3.0, "theirs": 6.0}}


@pytest.mark.slow
def test_the_benchmark_beside_other_processes_runs_to_its_end(tmp_path):
    document, _ = run_benchmarks(tmp_path, str(BENCHMARKS / "bench_load.py"), "-k", "1-thread")
    assert document["failed"] == []
    for row in document["comparisons"]:
        assert list(row["ratios"]) == ["FusedMCU", "nn.GRU", "nn.LSTM"]
        assert row["rounds"] >= 5
