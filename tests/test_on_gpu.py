"""benchmarks/on_gpu.sh without a GPU: over a fake nvidia-smi, cmake, probe, pip and pytest."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmixer_kernels import engines

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "benchmarks"
sys.path.insert(0, str(SOURCES))

import on_gpu  # noqa: E402

PROBE = """#!/bin/bash
case "$*" in
  facts) echo '{"kind": "device", "name": "made up", "capability": "9.0"}' ;;
  "kernels cluster forward")
    echo '{"kind": "hang", "path": "cluster", "direction": "forward", "hidden": 512,' \\
      '"terms": 1, "term_dtype": "bfloat16", "samples": 8}'
    exit 3 ;;
  "kernels cluster forward 128 1 bfloat16 8")
    echo '{"kind": "kernel", "hidden": 128, "us_per_step": 1.5}' ;;
  "kernels cluster forward 256 1 bfloat16 8") exit 3 ;;
  "kernels cluster backward") sleep 600 ;;
  "kernels cooperative forward")
    echo '{"kind": "kernel", "path": "cooperative", "direction": "forward", "hidden": 512,' \\
      '"terms": 1, "term_dtype": "float16", "samples": 4, "us_per_step": 3.25, "not_finite": 0,' \\
      '"differ": 4, "runs": 20}'
    exit 1 ;;
  "kernels cooperative backward") ;;
  "kernels wide forward") echo '{"kind": "error", "what": "no such kernel"}'; exit 2 ;;
  "kernels wide backward") ;;
  cell) kill -SEGV $$ ;;
  network) printf '{"kind": "l2", "what": "one-way", "ns": 412.0}\\n{"kind": "exch' ;;
  once*) ;;
  *) exit 2 ;;
esac
"""
FINE_PROBE = """#!/bin/bash
[[ $1 != facts ]] || echo '{"kind": "device", "name": "made up", "capability": "9.0"}'
"""
# The tests of "step" hang, with a process of their own; what measures sequences crashes.
PYTEST = """
case "$words" in
  *"-k step"*)
    echo 'test_a PASSED'; echo 'test_b PASSED'; echo 'test_c SKIPPED'
    sleep 600 & echo $! > "$FAKES/sleeping"
    trap '' INT
    wait; sleep 600 ;;
  *bench_cuda.py*sequence*)
    cp "$FAKES/results.json" "$results"; echo 'test_sequence PASSED'; kill -SEGV $$ ;;
  *test_cuda_device*) echo 'test_c SKIPPED' ;;
  *) echo 'test_d PASSED' ;;
esac
"""
FINE_PYTEST = """
echo 'test_d PASSED'
[[ -z $results ]] || cp "$FAKES/results.json" "$results"
"""


def row(steps: int, ours: float) -> dict[str, Any]:
    seconds = {"FusedMCU": ours, "nn.GRU": 7 * ours}
    settings = {"kind": "sequence", "steps": steps, "batch": 8, "hidden": 512, "ours": "FusedMCU"}
    settings |= {"precision": "bfloat16", "passes": "forward", "path": "step"}
    return {
        **{"case": f"{steps}x8x512", "error": 3e-3, "settings": settings, "missing": {}},
        "seconds": {"call": seconds, "GPU": seconds},
    }


class Machine(NamedTuple):
    """A copy of the script, and programs that stand for the machine's."""

    root: Path
    out: Path
    fakes: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "PYTHON": str(self.fakes / "python"),
            "OUT": str(self.out),
            "FAKES": str(self.fakes),
            "MMIXER_COMMIT": "abcdef",
        }
        command = ["bash", "benchmarks/on_gpu.sh", *words]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a background job
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words) as process:
            output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def sooner(self, constant: str) -> None:
        """Sets one of the script's times to one second."""
        script = self.root / "benchmarks" / "on_gpu.py"
        text, count = re.subn(
            rf"^{constant} = \d+$", f"{constant} = 1", script.read_text(), flags=re.M
        )
        assert count == 1
        script.write_text(text)

    def document(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.out / "on_gpu.json").read_text())
        return result


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    def build(probe: str = PROBE, pytest: str = PYTEST, pip: str = "exit 0") -> Machine:
        here = Machine(tmp_path / "copy", tmp_path / "out", tmp_path / "fakes")
        (here.root / "benchmarks").mkdir(parents=True)
        here.fakes.mkdir()
        for name in ("on_gpu.sh", "on_gpu.py", "gpu_table.py"):
            shutil.copy(SOURCES / name, here.root / "benchmarks")

        def program(name: str, text: str) -> None:
            (here.fakes / name).write_text(text)
            (here.fakes / name).chmod(0o755)

        program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA Made Up, 9.0'\n")
        program("gpu_probe", probe)
        program("compute-sanitizer", "#!/bin/sh\nexit 0\n")
        (here.root / "mmixer_kernels").mkdir()
        (here.root / "mmixer_kernels" / "_native.so").touch()
        program(
            "cmake",
            '#!/bin/sh\n[ "$1" = --build ] || exit 0\n'
            'mkdir -p "$2"\n[ "$4" != gpu_probe ] || cp "$FAKES/gpu_probe" "$2/gpu_probe"\n',
        )
        program(
            "python",
            f"""#!/bin/bash
            words="$*"
            while (($#)); do
              if [[ $1 == --results ]]; then results=$2; fi
              original+=("$1")
              shift
            done
            echo "$words" >> "$FAKES/calls"
            case "$words" in
              "-m pip"*) {pip} ;;
              "-m pytest"*)
                echo '=== test session starts ==='
                {pytest} ;;
              *mmixer_kernels*) echo 'engine cuda: made up' ;;
              *) exec {shlex.quote(sys.executable)} "${{original[@]}}" ;;
            esac
            """,
        )
        results = {"comparisons": [row(64, 2e-4), row(1024, 2e-4 + 960 * 1.4e-6)], "failed": []}
        (here.fakes / "results.json").write_text(json.dumps(results))
        return here

    return build


def line(text: str, *words: str) -> str:
    (found,) = [x for x in text.splitlines() if all(word in x for word in words)]
    return found


def is_running(process: int) -> bool:
    """Whether the process runs: it does not where only its exit status is left to be asked for."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_machine_where_everything_goes_wrong(machine: Callable[..., Machine]) -> None:
    here = machine()
    start = time.monotonic()
    result = here.run("--total", "75", "--limit", "2")
    assert time.monotonic() - start < 75
    assert result.returncode == 1, result.stderr
    assert len(list(here.out.iterdir())) <= 8
    assert not [path for path in here.out.iterdir() if path.suffix == ".part"]

    table = (here.out / "table.txt").read_text()
    assert table.strip() in result.stdout
    left_out = here.document()["left out"]
    assert set(left_out) == {"cell", "cluster", "cooperative", "wide", "step"}
    assert left_out["step"] == "its tests hung, 2 passed"
    hung = "forward hung at hidden 512, terms 1, term_dtype bfloat16, samples 8; "
    assert f"{hung}backward did not end" in left_out["cluster"]
    wrong = "forward is wrong: hidden 512, terms 1, term_dtype float16, samples 4: "
    assert f"{wrong}4 of 20 runs differ" in left_out["cooperative"]
    assert left_out["wide"] == "forward crashed: no such kernel"
    assert "crashed" in left_out["cell"]
    for path, why in left_out.items():
        assert path in table
        assert why in table

    parts = here.document()["parts"]
    assert "step: stopped after" in parts["tests"]["verdict"]
    assert "2 passed" in parts["tests"]["verdict"]
    assert "rest: nothing was run" in parts["tests"]["verdict"]
    assert "compiled: nothing was run" in parts["tests"]["verdict"]
    assert (parts["tests"]["passed"], parts["tests"]["skipped"]) == (2, 3)
    assert parts["sequence"]["verdict"].startswith("FAILED")
    assert parts["group"]["verdict"] == "passed"
    # The part that crashed had measured something, and the rest is said to be not measured.
    assert line(table, "as fast as nn.GRU", "64x8x512, bfloat16, forward  ").endswith("reached")
    assert line(table, "us per step: at most 1.5", "forward  ").split()[-2:] == ["1.40", "reached"]
    assert line(table, "N = 3 over N = 1", "64x8x512", "forward  ").endswith("not measured")

    # The parts that follow go without the paths that are left out, and nothing is left running.
    calls = (here.fakes / "calls").read_text()
    assert "-k cluster" not in calls
    assert "-k step" in calls
    with tarfile.open(here.out / "on_gpu.tar") as tar:
        assert {"probe.log", "probe.jsonl", "tests.log", "sequence.json"} <= set(tar.getnames())
        log = tar.extractfile("sequence.log")
        assert log is not None
        assert "MMIXER_CUDA_PATHS=step" in log.read().decode()
        log = tar.extractfile("sanitizer.log")
        assert log is not None
        for command in (x for x in log.read().decode().splitlines() if "test_small" in x):
            for path in ("cluster", "cooperative", "step"):
                assert f"not {path}" in command
    assert {"kind": "kernel", "hidden": 128, "us_per_step": 1.5} in here.document()["probe"]
    assert {"kind": "unparsed", "text": '{"kind": "exch'} in here.document()["probe"]
    assert not is_running(int((here.fakes / "sleeping").read_text()))


def test_a_machine_where_all_is_well(machine: Callable[..., Machine]) -> None:
    here = machine(FINE_PROBE, FINE_PYTEST)
    result = here.run("--total", "60")
    assert result.returncode == 0, result.stdout + result.stderr
    assert here.document()["left out"] == {}
    assert {part["verdict"] for part in here.document()["parts"].values()} == {"passed"}
    calls = (here.fakes / "calls").read_text()
    for path in ("cluster", "cooperative", "step"):
        assert f"-k {path}\n" in calls
    # --dry touches nothing, also where there are results already.
    kept = sorted(here.root.glob("build/on_gpu/*/*"))
    assert here.run("--dry").returncode == 0
    assert sorted(here.root.glob("build/on_gpu/*/*")) == kept

    # A second call has nothing left to do; a changed source has everything.
    (here.fakes / "calls").unlink()
    result = here.run("--total", "60")
    assert result.stdout.count("passed before") == len(on_gpu.PARTS)
    assert "-m pytest" not in (here.fakes / "calls").read_text()
    (here.root / "setup.py").write_text("changed\n")
    assert "passed before" not in here.run("--total", "60").stdout


def test_cmake_alone_where_pip_fails(machine: Callable[..., Machine]) -> None:
    here = machine(FINE_PROBE, FINE_PYTEST, pip="exit 1")
    result = here.run("--only", "build", "--only", "probe")
    assert result.returncode == 0, result.stdout
    assert "FAILED, exit status 1" in result.stdout
    assert (here.root / "build" / "plain" / "gpu_probe").exists()
    assert here.document()["parts"]["probe"]["verdict"] == "passed"


@pytest.mark.slow
def test_parts_that_no_time_is_left_for(machine: Callable[..., Machine]) -> None:
    here = machine(FINE_PROBE, "sleep 600")
    start = time.monotonic()
    result = here.run("--total", "20")
    assert time.monotonic() - start < 20
    assert result.returncode == 1
    parts = here.document()["parts"]
    assert parts["probe"]["verdict"] == "passed"
    assert "stopped after" in parts["sequence"]["verdict"]
    assert parts["network"]["verdict"] == "not run: no time left"
    assert "not run: no time left" in (here.out / "table.txt").read_text()


def test_an_interrupted_call_keeps_what_it_has(machine: Callable[..., Machine]) -> None:
    here = machine(FINE_PROBE, 'echo $$ > "$FAKES/sleeping"; sleep 600')
    with here.start() as process:
        for _ in range(300):
            if (here.fakes / "sleeping").exists():
                break
            time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode != 0
    assert here.document()["parts"]["probe"]["verdict"] == "passed"
    assert not is_running(int((here.fakes / "sleeping").read_text()))


def test_dry_says_what_would_run_and_runs_nothing(machine: Callable[..., Machine]) -> None:
    here = machine()
    result = here.run("--dry")
    assert result.returncode == 0
    assert "would run, 200 s at most" in result.stdout
    for words in ("pip install", "kernels cluster backward", "racecheck", "bench_network.py"):
        assert words in result.stdout
    for racecheck in (x for x in result.stdout.splitlines() if "--tool racecheck" in x):
        assert "once cluster" not in racecheck
        assert "test_small" not in racecheck or "not cluster" in racecheck
    assert not here.out.exists()
    assert not (here.root / "build").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--total", "600"], "must be at most 520, but is 600: call again for what is left"),
        (["--limit", "soon"], "must be a whole number of seconds, but is 'soon'"),
        (["--only", "table"], "invalid choice: 'table'"),
    ],
)
def test_wrong_arguments(machine: Callable[..., Machine], words: list[str], message: str) -> None:
    result = machine().run(*words)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_one_ended(machine: Callable[..., Machine]) -> None:
    """Parts that were cut off or not begun come first, failed ones last, and no number is lost."""
    here = machine(
        FINE_PROBE,
        """
        case "$words" in
          *"-k group or path"*) cp "$FAKES/results.json" "$results"; echo 'a FAILED'; exit 1 ;;
          *"-k paper"*)
            cp "$FAKES/results.json" "$results"
            [[ -e $FAKES/second ]] || sleep 600 ;;
        esac
        echo 'test_d PASSED'
        """,
    )
    here.run("--total", "40", "--limit", "3")
    first = here.document()
    assert "stopped" in first["parts"]["paper"]["verdict"]
    (here.fakes / "second").touch()
    (here.fakes / "calls").unlink()
    result = here.run("--total", "40")
    calls = (here.fakes / "calls").read_text()
    order = [calls.index(f"-k {words}") for words in ("paper", "group")]
    assert order == sorted(order)
    assert "-k sequence" not in calls
    assert result.stdout.count("passed before") == len(on_gpu.PARTS) - 2
    document = here.document()
    assert {*first["results"], "paper.1", "group.1"} <= {*document["results"], "paper"}
    assert document["parts"]["paper"]["verdict"] == "passed"


def test_results_so_far_are_there_while_a_part_runs(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops this script by force has what was measured until then."""
    here = machine(FINE_PROBE, 'cp "$FAKES/results.json" "$results"; sleep 600')
    here.sooner("REFRESH")
    here.run("--only", "build")
    with here.start("--only", "sequence") as process:
        for _ in range(150):
            if "sequence" in here.document()["results"]:
                break
            time.sleep(0.1)
        assert "sequence" in here.document()["results"]
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize(
    ("program", "hung"), [("import time; time.sleep(60)", False), ("sleep", True)]
)
@pytest.mark.slow
def test_what_does_not_heed_an_interrupt_hangs(
    machine: Callable[..., Machine], program: str, hung: bool
) -> None:
    """A slow start or a slow test is no hang: it ends by KeyboardInterrupt."""
    slow = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    here = machine(FINE_PROBE, "trap '' INT; sleep 60; sleep 60" if hung else slow)
    here.sooner("GRACE")
    here.run("--only", "build", "--only", "tests", "--limit", "1")
    left_out = here.document()["left out"]
    assert set(left_out) == ({"cluster", "cooperative", "step"} if hung else set())


def test_pytest_timeout_says_that_a_test_hung() -> None:
    assert on_gpu.Ended(1, 30, "+++++++++++ Timeout +++++++++++ ").hung
    assert not on_gpu.Ended(1, 30, "test_a FAILED\n").hung


def test_a_probe_that_no_time_was_left_for_leaves_no_path_out() -> None:
    assert on_gpu._fault(on_gpu.Ended(None, 0, "", cut=True)) is None
    assert on_gpu._fault(on_gpu.Ended(None, 20, "")) == "did not end: stopped after 20 s"
    hang = '{"kind": "hang", "hidden": 512, "terms": 1}'
    assert on_gpu._fault(on_gpu.Ended(3, 4, hang)) == "hung at hidden 512, terms 1"


BARE = """
import sys
BLOCKED = {"tyro", "av", "seglearn", "matplotlib", "tqdm", "docstring_parser", "typeguard", "tomli",
           "torchvision", "onnx", "onnxscript", "onnxruntime", "tensorboard"}
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Bare, sys.meta_path)
import pytest
raise SystemExit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "files",
    [
        ["tests/engines/test_cuda_device.py", "tests/engines/test_triton.py"],
        [
            *("benchmarks/engines/bench_cuda.py", "benchmarks/engines/bench_triton.py"),
            "benchmarks/bench_network.py",
        ],
    ],
    ids=["tests", "benchmarks"],
)
@pytest.mark.slow
def test_a_bare_machine_can_collect_everything(files: list[str]) -> None:
    pytest.importorskip("triton")
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "--collect-only", "-q", "-rs"]
    command = [sys.executable, "-c", BARE, *options, *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    for file in files:
        if file.endswith("test_cuda_device.py") and not engines()["cuda"].available:
            assert re.search(rf"{file}:\d+: engine cuda: ", result.stdout)  # after its last line
        else:
            assert result.stdout.count(f"{file}::") > 5, file
