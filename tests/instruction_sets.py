"""The CPU engine's C++ tests with every instruction set, emulated where the processor lacks it.

`python tests/instruction_sets.py [SET ...]` builds test_vector, test_engine and test_int8 and runs
them with each set, or with those that are named. It ends with a line per set: whether it ran
natively, emulated by what, or not at all and why, and its time with what was built for it. The exit
status is 1 where a test failed or a set did not run.

avx512, avx2, baseline: this processor's, or else Bochs's, which boots a Linux kernel for them.
aarch64: NEON, cross-compiled, under qemu-user. test_team runs too, for AArch64 orders memory
accesses by rules of its own.
forced64, forced16: AVX-512's and NEON's vectors and registers, made of the baseline's instructions:
all of the C++ that these sets run, but not the instructions.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from building import ROOT, SEARCH, build, build_directory, call, expect_success

X86 = ("avx512", "avx2", "baseline")
SETS = (*(X86 if platform.machine() == "x86_64" else ()), "aarch64", "forced64", "forced16")
LACKS_SET = 77
"""The exit status of a test whose instruction set the processor lacks."""

BIOS, VGA_BIOS = (f"/usr/share/bochs/{name}-latest" for name in ("BIOS-bochs", "VGABIOS-lgpl"))
BOOT = ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32")
QEMU = {"g++-aarch64-linux-gnu": "aarch64-linux-gnu-g++", "qemu-user-static": "qemu-aarch64-static"}
BOCHS = {
    "bochs": "bochs",
    "bochs-term": "/usr/share/doc/bochs-term",
    "bochsbios": BIOS,
    "vgabios": VGA_BIOS,
    "busybox-static": "busybox",
    "isolinux": BOOT[0],
    "syslinux-common": BOOT[1],
    "xorriso": "xorriso",
}
"""Debian's packages, with a program or a file of each."""
WITHOUT_PYTHON = "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON"
AARCH64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    WITHOUT_PYTHON,
)


class Fault(NamedTuple):
    """A statement of a header of csrc/cpu, what a faulty copy has instead, and who notices it."""

    test: str
    header: str
    statement: str
    faulty: str


FAULTS = (
    Fault("test_vector", "vector.h", "a = low;", ""),
    Fault("test_vector", "vector.h", "return e.power * e.rest + e.power;", "return e.power;"),
    Fault(
        *("test_engine", "gemm.h", "sums[i][j] += value * step[j];"),
        "sums[i][j] += value * step[i == tile_rows - 1 && j == NR - 1 ? 0 : j];",
    ),
    Fault(
        *("test_engine", "dot.h", "c[i][n + j] = total[i * NR + j];"),
        "c[i][n + j] = total[i * NR + (MR == 2 && j == dot_columns(2) - 1 ? 0 : j)];",
    ),
)
FAULT = "MMIXER_FAULT"
"""The variable of the environment that makes one of a faulty copy's faults, from 1 on."""


class Run(NamedTuple):
    """A test's program, its arguments, and its fault, or 0."""

    program: Path
    words: Sequence[str] = ()
    fault: int = 0


class Result(NamedTuple):
    status: int | None
    """None where the program did not end."""
    output: str


class NotRun(Exception):
    """The reason why a set does not run here."""


def missing(packages: dict[str, str]) -> list[str]:
    """The packages that are not installed."""
    return [
        package
        for package, brings in packages.items()
        if not (Path(brings).is_absolute() and Path(brings).exists())
        and not shutil.which(brings, path=SEARCH)
    ]


def require(packages: dict[str, str]) -> None:
    if lacks := missing(packages):
        install = f"apt-get install --no-install-recommends {' '.join(lacks)}"
        raise NotRun(f"there is no {', '.join(lacks)}: {install}")


def native(runs: Sequence[Run], launcher: Sequence[object] = ()) -> list[Result]:
    def result(run: Run) -> Result:
        try:
            ended = call(["env", f"{FAULT}={run.fault}", *launcher, run.program, *run.words])
            return Result(ended.returncode, ended.stdout)
        except subprocess.TimeoutExpired as expired:
            output = (expired.output or b"").decode(errors="replace")
            return Result(None, f"{output}It did not end in {expired.timeout} seconds.")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(result, runs))


def qemu(runs: Sequence[Run]) -> list[Result]:
    return native(runs, ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"])


def kernel() -> Path:
    """Debian's kernel for virtual machines, which is downloaded once and not installed."""
    folder = build_directory().parent / "kernel"
    if not [*folder.glob("boot/vmlinuz-*")]:
        depends = expect_success(["apt-cache", "depends", "linux-image-cloud-amd64"])
        if not (found := re.search(r"Depends: (linux-image-\S+)", depends)):
            raise NotRun("apt knows no linux-image-cloud-amd64: apt-get update")
        print(f"Downloading {found[1]} into {folder}.", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            expect_success(["sh", "-c", f"cd {directory} && apt-get -qq download {found[1]}"])
            (package,) = Path(directory).iterdir()
            expect_success(["dpkg", "-x", package, folder])
    (image,) = folder.glob("boot/vmlinuz-*")
    return image


# clearcpuid: Bochs 2.7's CPUID gives the size of the standard XSAVE format for that of the
# compacted one, and Linux then turns all of AVX off.
BOOT_MENU = """\
default linux
label linux
  kernel vmlinuz
  append initrd=initrd.gz console=ttyS0,115200 rdinit=/init mitigations=off nokaslr panic=1 \
clearcpuid=xsavec,xsaves quiet
"""
BOCHSRC = f"""\
megs: 512
cpu: model=corei7_skylake_x, count=1, ips=50000000, ignore_bad_msrs=1, reset_on_triple_fault=0
romimage: file={BIOS}
vgaromimage: file={VGA_BIOS}
boot: cdrom
ata0-master: type=cdrom, path=boot.iso, status=inserted
com1: enabled=1, mode=file, dev=serial.txt
display_library: term
clock: sync=none
log: bochs.log
panic: action=fatal
error: action=report
sound: driver=dummy
speaker: enabled=0
"""
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1
{runs}
echo == end
poweroff -f
"""


def bochs(runs: Sequence[Run]) -> list[Result]:
    """All runs in one machine, a Skylake-X, whose whole system is busybox and the programs."""
    require(BOCHS)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        root, image = work / "root", work / "image"
        for folder in (root / "bin", root / "dev", image):
            folder.mkdir(parents=True)
        shutil.copy(expect_success(["which", "busybox"]).strip(), root / "bin")
        lines = []
        for number, run in enumerate(runs):
            shutil.copy(run.program, root / f"program{number}")
            for library in re.findall(r"(/\S+) \(0x", expect_success(["ldd", run.program])):
                target = root / library[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, target)
            words = " ".join(run.words)
            lines += [f"echo == run; {FAULT}={run.fault} /program{number} {words}"]
            lines += ["echo == status $?"]
        (root / "init").write_text(INIT.format(runs="\n".join(lines)))
        (root / "init").chmod(0o755)
        archive = "find . | busybox cpio -o -H newc 2> /dev/null | gzip -1 > ../image/initrd.gz"
        subprocess.run(archive, shell=True, cwd=root, check=True)
        shutil.copy(kernel(), image / "vmlinuz")
        for file in BOOT:
            shutil.copy(file, image)
        (image / "isolinux.cfg").write_text(BOOT_MENU)
        boots = "-b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table"
        iso = ["-quiet", "-o", work / "boot.iso", *boots.split(), image]
        expect_success(["xorriso", "-as", "mkisofs", *iso])
        (work / "bochsrc").write_text(BOCHSRC)
        (work / "continue").write_text("c\n")  # Debian's Bochs has its debugger, which waits
        print(f"Bochs runs {len(runs)} programs, which takes minutes.", flush=True)
        # The display, which nobody looks at, needs a terminal. The exit status is 1 after a
        # power-off too.
        subprocess.run(
            ["timeout", "3600", "script", "-qc", "bochs -q -f bochsrc -rc continue", "/dev/null"],
            **{"cwd": work, "env": {**os.environ, "TERM": "linux"}},
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
        )
        serial = (work / "serial.txt").read_text(errors="replace").replace("\r", "")
        log = (work / "bochs.log").read_text(errors="replace")
    results = []
    for part in serial.partition("== end")[0].split("== run\n")[1:]:
        output, _, status = part.partition("== status ")
        results.append(Result(int(status) if status else None, output))
    for _ in runs[len(results) :]:
        results.append(Result(None, f"{serial[-2000:]}\n{log[-2000:]}"))
    return results


def faulty_source() -> Path:
    """A copy of the sources that has the faults, and whose tests end at their first failure."""
    copy = build_directory().parent / "faulty"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("CMakeLists.txt", "benchmarks"):
        (copy / name).symlink_to(ROOT / name)
    for name in ("csrc", "tests/csrc"):
        shutil.copytree(ROOT / name, copy / name)

    def replace(path: str, old: str, new: str) -> None:
        text = (copy / path).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{path} must have {old!r} once, for a fault to be planted there")
        (copy / path).write_text(text.replace(old, new))

    for number, (_, header, statement, faulty) in enumerate(FAULTS, 1):
        planted = f"if (planted == {number}) {{ {faulty} }} else {{ {statement} }}"
        replace(f"csrc/cpu/{header}", statement, planted)
    read = f'static const int planted = std::atoi(std::getenv("{FAULT}"));'
    start = "namespace mmixer::cpu::MMIXER_ISA {\n\n#if"
    replace("csrc/cpu/vector.h", start, f"#include <cstdlib>\n{read}\n{start}")
    for test in ("vector", "engine"):
        first = "if (!ok && ++failures <= 30)"
        end = 'if (!ok) std::puts("FAILED"), std::fflush(stdout), std::_Exit(1);'
        replace(f"tests/csrc/test_{test}.cpp", first, f"{end}\n  {first}")
    return copy


def targets(name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The programs of a set and their arguments, by test."""
    if name.startswith("forced"):
        return {test: (f"{test}_{name}", ()) for test in ("test_vector", "test_engine")}
    compiled = "baseline" if name == "aarch64" else name
    return {
        "test_vector": (f"test_vector_{compiled}", ()),
        "test_engine": ("test_engine", (compiled,)),
        "test_int8": ("test_int8", ()),  # with all of its own sets that the processor has
        **({"test_team": ("test_team", ())} if name == "aarch64" else {}),
    }


def run_set(name: str, faults: bool, in_bochs: bool) -> tuple[str, list[str]]:
    """The way in which a set ran, and what failed. Raises NotRun where it cannot run."""
    cross = name == "aarch64" and platform.machine() != "aarch64"
    if cross:
        require(QEMU)
    options = AARCH64 if cross else ()
    programs = targets(name)
    names = [program for program, _ in programs.values()]
    folder = build(*names, options=options)
    runs = [Run(folder / program, words) for program, words in programs.values()]
    if faults:
        faster = ("-DCMAKE_CXX_FLAGS_RELEASE=-O1", WITHOUT_PYTHON)
        folder = build(*names, source=faulty_source(), options=(*options, *faster))
        for number, fault in enumerate(FAULTS, 1):
            program, words = programs[fault.test]
            runs.append(Run(folder / program, words, number))
    how, machine = ("emulated by qemu-user", qemu) if cross else ("natively", native)
    if name in X86 and (in_bochs or native(runs[:1])[0].status == LACKS_SET):
        how, machine = "emulated by Bochs", bochs
    failures = []
    for run, result in zip(runs, machine(runs), strict=True):
        text = f"{run.program.name} {' '.join(run.words)}".strip()
        if run.fault:
            fault = FAULTS[run.fault - 1]
            if result.status != 1 or "FAILED" not in result.output:
                failures.append(f"{text} does not notice {fault.faulty!r} in {fault.header}")
        elif result.status != 0:
            failures.append(f"{text} ended with {result.status}\n{result.output[-3000:]}")
        else:
            print(f"{name}: {text}: {result.output.splitlines()[-1]}", flush=True)
    return how, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=" ".join(SETS))
    parser.add_argument("--faults", action="store_true", help="each set must notice planted faults")
    parser.add_argument("--bochs", action="store_true", help="this processor's own sets in Bochs")
    parser.add_argument(
        "--missing", action="store_true", help="only print the Debian packages that are missing"
    )
    options = parser.parse_args()
    names = options.sets or list(SETS)
    if unknown := {*names} - {*SETS}:
        parser.error(f"SET must be one of {' '.join(SETS)}, but is {' '.join(sorted(unknown))}")
    if options.missing:
        wanted = QEMU if "aarch64" in names and platform.machine() != "aarch64" else {}
        wanted = wanted | (BOCHS if "avx512" in names else {})
        print(*missing(wanted))
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    lines, failed = [], False
    for name in names:
        start = time.monotonic()
        try:
            how, failures = run_set(name, options.faults, options.bochs)
            noticed = f", {len(FAULTS)} planted faults noticed" if options.faults else ""
            passed = not failures
            outcome = f"{how}, passed{noticed}" if passed else f"{how}, FAILED"
        except (NotRun, AssertionError) as reason:
            passed, failures = False, [str(reason)] if isinstance(reason, AssertionError) else []
            outcome = "not run: " + ("a command failed" if failures else str(reason))
        print("".join(f"{name}: {failure}\n" for failure in failures), end="", flush=True)
        failed |= not passed
        lines.append(f"{name:9} {outcome}, {time.monotonic() - start:.0f} s")
    print(*lines, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
