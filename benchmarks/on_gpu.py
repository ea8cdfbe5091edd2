"""Builds, probes, tests and measures the engines for GPUs, on a machine with nvcc and a GPU.

Time on such a machine is short. So what decides most comes first, no command can take more than its
limit, and a path of the CUDA engine that hangs or differs from run to run is left out of all that
follows. Parts, in this order:

  build      pip's install of this checkout, else CMake's build alone; and gpu_probe
  probe      gpu_probe: the device, its network; each kernel: does it end, differ, how fast is it
  sequence   benchmarks/engines/bench_cuda.py, what the targets are about: each precision
  group      the same: N = 3 beside N = 1, and the paths beside each other
  paper      the same: the paper's calls, H = 768, and the names of cuDNN's kernels
  tests      tests/engines/test_cuda_device.py, a process for each path
  variants   bench_cuda.py: both directions without context; teams of 4 samples beside 8, packets of
             16 bytes beside 8
  sizes      the same: other sizes
  triton     tests of the triton engine, and benchmarks/engines/bench_triton.py
  network    benchmarks/bench_network.py
  compiled   torch.compile of the eager reference and of the network; FlashRNN, if it is here
  sanitizer  compute-sanitizer on gpu_probe and small tests; racecheck not on clusters, of whose
             asynchronous stores it may know nothing

Three files are left in ${OUT:-benchmarks/on_gpu}, renewed as it goes: table.txt, on_gpu.json (all
numbers, for benchmarks/results/) and on_gpu.tar (logs and everything). While the sources and the
GPU are the same, build/on_gpu remembers what was done: a further call begins with what was cut off
or not begun, and then repeats what failed; earlier numbers are kept. Its --total is the time that
is left less a minute. The exit status is 1 where a part did not pass. In a copy without git's own
files, MMIXER_COMMIT names the commit. PYTHON is the interpreter that has torch, else this one.
"""

from __future__ import annotations

import argparse
import hashlib
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
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("PYTHON") or sys.executable
PERSISTENT = ("cluster", "cooperative", "wide")
PATHS = ("cell", *PERSISTENT, "step")
"""The engine's paths (mmixer_kernels/engines/cuda.py), which nothing here imports: it may be
broken."""
TESTED = ("cluster", "cooperative", "step")
"""Paths that the device tests name; "wide" is measured alone."""
DIRECTIONS = ("forward", "backward")
MOST_SECONDS = 520
"""Seconds of all parts. A command on a lent machine ends after 600, and its end must not come
first."""
RESERVE = 15
"""Seconds of --total that are kept for the last table and tar."""
GRACE = 5
"""Seconds for a command to end after an interrupt, before it is killed."""
REFRESH = 20
"""Seconds after which what is left for others is renewed while a command runs."""
HANG = 3
"""The probe's exit status for a kernel that does not end."""
NO_TESTS = 5
"""pytest's exit status where it has selected no test."""
PARTS = (
    *("build", "probe", "sequence", "group", "paper", "tests", "variants", "sizes"),
    *("triton", "network", "compiled", "sanitizer"),
)
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-v", "-rs")
DEVICE_TESTS = "tests/engines/test_cuda_device.py"


class Ended(NamedTuple):
    """The end of a command: its exit status and output."""

    status: int | None  # None: it was stopped at its limit
    seconds: float
    output: str
    killed: bool = False  # it did not heed an interrupt
    cut: bool = False  # its limit was what was left of --total

    def count(self, outcome: str) -> int:
        """Tests of pytest -v: PASSED, FAILED, SKIPPED."""
        return len(re.findall(rf" {outcome}\b", self.output))

    @property
    def hung(self) -> bool:
        """A kernel that does not end keeps pytest from heeding an interrupt; what is only slow
        does. pytest-timeout ends the process, and says so."""
        return self.killed or "+++ Timeout +++" in self.output

    @property
    def _of_these(self) -> str:
        tests = "= test session starts =" in self.output
        return f", {self.count('PASSED')} passed" if tests else ""

    def of_tests(self) -> Ended:
        """The same end, but not a success where every test was skipped, which pytest calls one."""
        nothing = self.status == 0 and self.output != "" and not self.count("PASSED")
        return self._replace(status=NO_TESTS) if nothing else self

    @property
    def verdict(self) -> str:
        if self.status == NO_TESTS:
            return "nothing was run: no test, or each was skipped"
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s{self._of_these}"
        if self.status == 0:
            return "passed"
        return f"FAILED, exit status {self.status}{self._of_these}"


class Job:
    """One call of this script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.monotonic()
        self.environment = _environment()
        self.gpu = _output(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"])
        self.commit = os.environ.get("MMIXER_COMMIT") or _output(["git", "rev-parse", "HEAD"])
        self.environment["MMIXER_COMMIT"] = self.commit
        self.folder = ROOT / "build" / "on_gpu" / _fingerprint(self.gpu)
        self.out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "on_gpu")
        self.parts: dict[str, dict[str, Any]] = {}
        self.tests_run = {"passed": 0, "skipped": 0}  # of the part that runs
        self.left_out: dict[str, str] = {}
        self.timeout_plugin = False
        if options.dry:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        if (known := _read_json(self.folder / "state.json")) is not None:
            self.parts, self.left_out = known["parts"], known["left out"]
        find = "import importlib.util as util; print(util.find_spec('pytest_timeout') is not None)"
        self.timeout_plugin = _output([PYTHON, "-c", find]) == "True"

    @property
    def left(self) -> float:
        """The seconds that are left of the script's time."""
        return self.options.total - RESERVE - (time.monotonic() - self.start)

    @property
    def paths(self) -> list[str]:
        return [path for path in PATHS if path not in self.left_out]

    def run(self, log: str, limit: int, *words: str | Path, **environment: str) -> Ended:
        """A command in a process group of its own, output to a log; what it starts ends with it."""
        command = [str(word) for word in words]
        shown = shlex.join([f"{k}={v}" for k, v in environment.items()] + command)
        limit = self.options.limit or limit
        if self.options.dry:
            print(f"  would run, {limit} s at most: {shown}")
            return Ended(0, 0, "")
        seconds = min(limit, self.left)
        path = self.folder / f"{log}.log"
        with open(path, "a") as file:
            print(f"$ {shown}", file=file, flush=True)
            before = file.tell()
            if seconds < 1:
                print("no time left", file=file)
                return Ended(None, 0, "", cut=True)
            start = time.monotonic()
            try:
                status, killed = self._wait(command, environment, file, seconds)
            except OSError as error:
                print(error, file=file)
                status, killed = 127, False
            ended = Ended(
                status, time.monotonic() - start, _tail(path, before), killed, seconds < limit
            )
            print(f"{ended.verdict}, {ended.seconds:.1f} s", file=file)
        for outcome in self.tests_run:
            self.tests_run[outcome] += ended.count(outcome.upper())
        if ended.status != 0:
            print(f"  {ended.verdict}: {' '.join(shown.split())[:160]}", flush=True)
        return ended

    def _wait(
        self, command: list[str], environment: dict[str, str], file: Any, seconds: float
    ) -> tuple[int | None, bool]:
        """The exit status, None after so many seconds; and whether an interrupt was not enough."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_begin,
        )
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, REFRESH)), False
                self.report()
            _signal(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
                return None, False
            return None, True
        finally:
            _signal(process, signal.SIGKILL)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                print(f"process {process.pid} cannot be killed", file=file)

    def pytest_words(self, longest: int) -> list[str]:
        """longest: seconds of a test, after which its process ends."""
        stop = ["-o", f"faulthandler_timeout={longest}"]
        if self.timeout_plugin:
            stop = ["--timeout", str(longest), "--timeout-method", "thread"]
        return [PYTHON, *PYTEST, "--maxfail", "40", *stop]

    def pytest(self, log: str, limit: int, longest: int, *words: str | Path) -> Ended:
        pytest = self.pytest_words(longest)
        return self.run(
            log, limit, *pytest, *words, MMIXER_CUDA_PATHS=",".join(self.paths)
        ).of_tests()

    def measure(self, name: str, file: str, limit: int, longest: int, *words: str | Path) -> str:
        """pytest on a file of benchmarks, which writes its results after each comparison."""
        results = self.folder / f"{name}.json"
        if results.exists() and not self.options.dry:  # of a run that did not come to its end
            earlier = len(list(self.folder.glob(f"{name}.*.json")))
            results.rename(self.folder / f"{name}.{earlier + 1}.json")
        return self.pytest(
            *(name, limit, longest, f"benchmarks/{file}", "--benchmark-only", "--budget", "0.4"),
            *("--results", results, *words),
        ).verdict

    def leave_out(self, path: str, why: str) -> None:
        self.left_out[path] = f"{self.left_out[path]}; {why}" if path in self.left_out else why
        print(f"  path {path} is left out: {why}")

    # Each part, from here to `main`, returns its verdict: "passed", or what went wrong.

    def build(self) -> str:
        pip = self.run(
            *("build", 200, PYTHON, "-m", "pip", "install", "--verbose"),
            *("--no-build-isolation", "--no-deps", "."),
        )
        caches = (ROOT / "build").glob("temp*/CMakeCache.txt")
        folder = max((x.parent for x in caches), key=lambda x: x.stat().st_mtime, default=None)
        verdict = "passed"
        if pip.status != 0 or folder is None:
            folder = ROOT / "build" / "plain"
            verdict = self._build_by_cmake(folder)
        # The probe needs neither Python nor torch, and tells of a GPU where these cannot.
        probe = self.run("build", 100, "cmake", "--build", folder, "--target", "gpu_probe").verdict
        if probe == "passed" and not self.options.dry:
            shutil.copy2(folder / "gpu_probe", self.folder / "gpu_probe")
        engine = self.run("build", 60, PYTHON, "-c", _ENGINE_HERE).verdict
        verdicts = {"extension": verdict, "gpu_probe": probe, "engine cuda": engine}
        return _failed(verdicts)

    def _build_by_cmake(self, folder: Path) -> str:
        """The extension is built into the checkout, from which the package is then imported."""
        find = "import pybind11; print(pybind11.get_cmake_dir())"
        pybind11 = "PYBIND11" if self.options.dry else _output([PYTHON, "-c", find])
        configured = self.run(
            *("build", 60, "cmake", "-S", ".", "-B", folder, "-G", "Ninja"),
            *(f"-DPython_EXECUTABLE={PYTHON}", "-DPYBIND11_FINDPYTHON=ON"),
            *(f"-Dpybind11_DIR={pybind11}",),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'mmixer_kernels'}",
        )
        if configured.status != 0:
            return configured.verdict
        return self.run("build", 200, "cmake", "--build", folder).verdict

    def probe(self) -> str:
        program = self.folder / "gpu_probe"
        if not self.options.dry and not program.exists():
            return "not run: there is no gpu_probe"
        self.left_out.clear()
        records = self.folder / "probe.jsonl"
        if not self.options.dry:
            records.write_text("")
        verdicts = {}

        def ask(limit: int, *words: str) -> Ended:
            ended = self.run("probe", limit, program, *words)
            with open(os.devnull if self.options.dry else records, "a") as file:
                for line in ended.output.splitlines():
                    if line.startswith("{"):
                        record = _record(line) or {"kind": "unparsed", "text": line}
                        print(json.dumps(record), file=file)
            verdicts[" ".join(words)] = ended.verdict
            return ended

        ask(15, "facts")
        for path in PERSISTENT:
            for direction in DIRECTIONS:
                ended = ask(20, "kernels", path, direction)
                if (why := _fault(ended)) is not None:
                    self.leave_out(path, f"{direction} {why}")
                if ended.status == HANG:  # is it so for teams of fewer blocks too?
                    for hidden in ("128", "256"):
                        ask(8, "kernels", path, direction, hidden, "1", "bfloat16", "8")
        if (why := _fault(ask(15, "cell"))) is not None:
            self.leave_out("cell", why)
        ask(15, "network")
        return _failed(verdicts)

    def sequence(self) -> str:
        selection = ("-k", "sequence and not kernels")
        return self.measure("sequence", "engines/bench_cuda.py", 150, 60, *selection)

    def group(self) -> str:
        return self.measure("group", "engines/bench_cuda.py", 90, 60, "-k", "group or path")

    def paper(self) -> str:
        selection = ("-k", "paper or wide or kernels")
        return self.measure("paper", "engines/bench_cuda.py", 120, 60, *selection)

    def tests(self) -> str:
        verdicts = {}
        for path in (path for path in TESTED if path in self.paths):
            ended = self.pytest("tests", 60, 20, DEVICE_TESTS, "--durations", "5", "-k", path)
            verdicts[path] = ended.verdict
            if ended.hung:
                self.leave_out(path, f"its tests hung, {ended.count('PASSED')} passed")
        rest = " and ".join(f"not {path}" for path in TESTED)
        # Inductor and Triton take a minute.
        for name, limit, more in (("rest", 60, "not compile"), ("compiled", 120, "compile")):
            selection = ("--durations", "5", "-k", f"{rest} and {more}")
            ended = self.pytest("tests", limit, 60, DEVICE_TESTS, *selection)
            verdicts[name] = ended.verdict
        return _failed(verdicts)

    def variants(self) -> str:
        selection = ("-k", "stack or samples or packets")
        return self.measure("variants", "engines/bench_cuda.py", 90, 40, *selection)

    def sizes(self) -> str:
        return self.measure("sizes", "engines/bench_cuda.py", 100, 60, "-k", "size")

    def triton(self) -> str:
        selection = ("-k", "not compile and not spill")
        tests = self.pytest("triton", 120, 60, "tests/engines/test_triton.py", *selection).verdict
        measured = self.measure("triton", "engines/bench_triton.py", 150, 60)
        return _failed({"tests": tests, "benchmarks": measured})

    def network(self) -> str:
        return self.measure("network", "bench_network.py", 120, 60, "-k", "not compiled")

    def compiled(self) -> str:
        words = ("-k", "compiled", "--compile-limit", "100")
        units = self.measure("compiled", "engines/bench_cuda.py", 240, 130, *words)
        network = self.measure("compiled_network", "bench_network.py", 150, 130, *words)
        return _failed({"units": units, "network": network})

    def sanitizer(self) -> str:
        tool = shutil.which("compute-sanitizer", path=self.environment["PATH"])
        if tool is None and not self.options.dry:
            return "not run: there is no compute-sanitizer"
        probes = [
            ("once", path, direction)
            for path in PERSISTENT
            for direction in DIRECTIONS
            if path in self.paths
        ]
        probes += [("once", "cell")] if "cell" in self.paths else []
        verdicts = {}
        for check in ("memcheck", "racecheck"):
            # Calls that fail are looked at where they are made; torch and CUPTI try some that must.
            words = (tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9")
            words += ("--report-api-errors", "no")
            for probe in probes:
                if check == "memcheck" or "cluster" not in probe:
                    ended = self.run("sanitizer", 60, *words, self.folder / "gpu_probe", *probe)
                    verdicts[f"{check} {' '.join(probe)}"] = ended.verdict
            without = {*self.left_out, *(["cluster"] if check == "racecheck" else [])} - {"cell"}
            selection = "test_small and (bfloat16 or float32-high)"
            selection += "".join(f" and not {path}" for path in sorted(without))
            # Nothing is asked of torch's own kernels.
            ended = self.run(
                *("sanitizer", 60, *words, "--kernel-name", "kns=mmixer"),
                *(*self.pytest_words(40), DEVICE_TESTS, "-k", selection),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
                MMIXER_CUDA_PATHS=",".join(self.paths),
            ).of_tests()
            verdicts[f"{check} tests"] = ended.verdict
        return _failed(verdicts)

    def main(self) -> int:
        print(f"commit {self.commit or 'unknown'}; GPU {self.gpu or 'none'}; results in {self.out}")
        chosen = [name for name in PARTS if name in (self.options.only or PARTS)]
        verdicts = {}
        try:
            for name in sorted(chosen, key=self._has_failed):
                verdicts[name] = self._part(name)
        finally:
            table = self.report()
        print(table)
        return 0 if all(verdict == "passed" for verdict in verdicts.values()) else 1

    def _has_failed(self, name: str) -> bool:
        """Whether the part failed in an earlier call; one that was cut off or could not begin did
        not."""
        return "FAILED" in self.parts.get(name, {}).get("verdict", "")

    def _is_done(self, name: str) -> bool:
        if self.parts.get(name, {}).get("verdict") != "passed":
            return False
        if self.options.again or self.options.only:
            return False
        built = (self.folder / "gpu_probe").exists()
        return name != "build" or (built and any((ROOT / "mmixer_kernels").glob("_native*.so")))

    def _part(self, name: str) -> str:
        part: Callable[[], str] = getattr(self, name)
        if self.options.dry:
            print(f"{name}:")
            part()
            return "passed"
        if self._is_done(name):
            print(f"{name}: passed before")
            return "passed"
        print(f"{name}:", flush=True)
        start = time.monotonic()
        self.tests_run = dict.fromkeys(self.tests_run, 0)
        try:
            verdict = part() if self.left >= 1 else "not run: no time left"
        except Exception as error:  # of this script: the other parts' results must survive it
            (self.folder / f"{name}.traceback").write_text(traceback.format_exc())
            verdict = f"FAILED, {type(error).__name__}: {error}"
        seconds = round(time.monotonic() - start, 1)
        self.parts[name] = {"verdict": verdict, "seconds": seconds, **self.tests_run}
        print(f"{name}: {verdict}, {seconds:.0f} s", flush=True)
        self.report()
        return verdict

    def report(self) -> str:
        """The table of what was seen; the files that are left for others are renewed."""
        if self.options.dry:
            return ""
        _write_json(self.folder / "state.json", {"parts": self.parts, "left out": self.left_out})
        results = {
            path.stem: document
            for path in sorted(self.folder.glob("*.json"))
            if path.stem != "state" and (document := _read_json(path)) is not None
        }
        probe = self.folder / "probe.jsonl"
        lines = probe.read_text().splitlines() if probe.exists() else []
        document = {
            **{"commit": self.commit, "gpu": self.gpu, "parts": self.parts},
            **{"left out": self.left_out, "probe": _records(lines), "results": results},
        }
        try:
            import gpu_table

            table = gpu_table.text(document)
        except Exception:  # the numbers are in the JSON all the same
            table = traceback.format_exc()
        _write_json(self.out / "on_gpu.json", document)
        _write(self.out / "table.txt", lambda path: path.write_text(table + "\n"))
        shutil.copy2(self.out / "table.txt", self.folder / "table.txt")
        _write(self.out / "on_gpu.tar", self._pack)
        return table

    def _pack(self, path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for file in sorted(self.folder.iterdir()):
                if file.name != "gpu_probe":
                    tar.add(file, file.name)


_ENGINE_HERE = """
from mmixer_kernels import engines
state = engines()["cuda"]
print("engine cuda:", state.reason)
raise SystemExit(not state.available)
"""


def _failed(verdicts: dict[str, str]) -> str:
    """The verdict on several commands: "passed", or those that have not."""
    return "; ".join(f"{k}: {v}" for k, v in verdicts.items() if v != "passed") or "passed"


def _fault(ended: Ended) -> str | None:
    """Why a path must not be taken, by its probe; None where it may."""
    records = _records(ended.output.splitlines())
    hang = next((record for record in records if record.get("kind") == "hang"), None)
    if hang is not None:
        return f"hung at {_kernel(hang)}"
    if ended.status == 0:
        return None
    if ended.status is None:
        return None if ended.cut else f"did not end: {ended.verdict}"
    wrong = [
        f"{_kernel(record)}: {record.get('differ')} of {record.get('runs')} runs differ, "
        f"{record.get('not_finite')} values not finite, error {record.get('error', 'not known')}"
        for record in records
        if ended.status == 1 and (record.get("differ") or record.get("not_finite"))
    ]
    if ended.status == 1:
        return "is wrong: " + ("; ".join(wrong) or "its error is above the probe's bound")
    errors = [str(record.get("what")) for record in records if record.get("kind") == "error"]
    return f"crashed: {'; '.join(errors) or f'exit status {ended.status}'}"


def _kernel(record: dict[str, Any]) -> str:
    """The kernel of a record of the probe, in words."""
    names = ("hidden", "terms", "term_dtype", "samples", "batch")
    return ", ".join(f"{name} {record[name]}" for name in names if name in record)


def _environment() -> dict[str, str]:
    """The environment of all commands: programs beside the interpreter and CUDA's are found, a
    process has one thread (its references' operations are tiny), products have equal bits, and pip,
    which installs this checkout alone, asks nobody."""
    folders = [str(Path(PYTHON).parent), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    }


def _output(command: Sequence[str]) -> str:
    """The text that a short command prints; empty where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _fingerprint(gpu: str) -> str:
    """A digest of the sources and the GPU: while it is the same, what passed need not run again."""
    folders = ("csrc", "python", "mmixer_kernels", "benchmarks", "tests")
    kinds = {".py", ".h", ".cu", ".cpp", ".sh", ".toml"}
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds
    ]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt")]
    digest = hashlib.sha256(gpu.encode())
    for path in sorted(filter(Path.is_file, files)):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _begin() -> None:
    """A command's process: in a group of its own, and it heeds an interrupt, which a shell's
    background jobs do not. It has no session of its own: on a lent machine what is left in one
    runs on, and would share the GPU with the next call."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the process and all that it started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _tail(path: Path, start: int) -> str:
    with open(path, errors="replace") as file:
        file.seek(start)
        return file.read()


def _records(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects among the lines."""
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str) -> dict[str, Any] | None:
    """None for a line that was cut off where its process was killed, and for other output."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _read_json(path: Path) -> Any:
    """None where there is no whole document."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """The file is written beside, then renamed, so that a fault does not lose the one before.
    mmixer_kernels/atomic.py does the same, but this script runs without that package and torch."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    _write(path, lambda beside: beside.write_text(json.dumps(document, indent=1) + "\n"))


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of seconds, but is {text!r}")
    return int(text)


def _total(text: str) -> int:
    seconds = _seconds(text)
    if seconds > MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"must be at most {MOST_SECONDS}, but is {text}: call again for what is left"
        )
    return seconds


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="on_gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; repeatable")
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument(
        "--limit", type=_seconds, metavar="SECONDS", help="of each command, for its part's own"
    )
    parser.add_argument(
        "--total",
        type=_total,
        default=330,
        metavar="SECONDS",
        help=f"of all parts (330), {MOST_SECONDS} at most",
    )
    parser.add_argument("--dry", action="store_true", help="say what would run, and run nothing")
    return parser.parse_args(arguments)


def _end(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # commands are ended, and what was measured is kept
    sys.exit(Job(_options(None)).main())
