"""tests/instruction_sets.py: what it says of what cannot run, and its faults."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import instruction_sets
import pytest
from instruction_sets import FAULTS, Result, Run


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["instruction_sets.py", *words])
    with pytest.raises(SystemExit) as end:
        instruction_sets.main()
    return int(end.value.code or 0)


def test_faults_are_planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each stands in a copy beside its statement, which the sources have once."""
    monkeypatch.setenv("MMIXER_TEST_BUILD", str(tmp_path))
    copy = instruction_sets.faulty_source()
    for fault in FAULTS:
        text = (copy / "csrc" / "cpu" / fault.header).read_text()
        assert f"{{ {fault.faulty} }} else {{ {fault.statement} }}" in text


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instruction_sets, "QEMU", {"sh": "sh", "no-such": "no-such-program"})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert main(monkeypatch, "aarch64") == 1
    expected = "aarch64   not run: there is no no-such: apt-get install --no-install-recommends "
    assert capsys.readouterr().out.startswith(f"{expected}no-such, ")


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (Result(0, "0 failures"), "avx2      natively, passed"),
        (Result(1, "3 failures"), "avx2: test_engine avx2 ended with 1\n3 failures\n"),
        (Result(None, "no room"), "avx2: test_engine avx2 ended with None\nno room\n"),
    ],
)
def test_the_exit_status_tells_of_failures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: Result,
    says: str,
) -> None:
    monkeypatch.setattr(instruction_sets, "SETS", ("avx2",))
    monkeypatch.setattr(instruction_sets, "build", lambda *names, options: Path("build"))
    passed = Result(0, "0 failures")
    outcomes = {"test_vector_avx2": passed, "test_engine": result, "test_int8": passed}

    def native(runs: list[Run]) -> list[Result]:
        return [outcomes[run.program.name] for run in runs]

    monkeypatch.setattr(instruction_sets, "native", native)
    assert main(monkeypatch) == (result.status != 0)
    out = capsys.readouterr().out
    assert says in out
    assert "avx2      natively, " + ("passed" if result.status == 0 else "FAILED") in out


def test_a_program_that_does_not_end_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(subprocess.run, stdout=subprocess.PIPE, text=True, timeout=3)
    monkeypatch.setattr(instruction_sets, "call", run)
    hangs, ends = (
        Run(Path("sh"), ("-c", f"echo begun; {then}")) for then in ("exec sleep 60", ":")
    )
    assert instruction_sets.native([hangs, ends]) == [
        Result(None, "begun\nIt did not end in 3 seconds."),
        Result(0, "begun\n"),
    ]


def test_a_fault_that_nobody_notices_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instruction_sets, "SETS", ("forced64",))
    monkeypatch.setattr(instruction_sets, "faulty_source", lambda: Path("faulty"))
    monkeypatch.setattr(instruction_sets, "build", lambda *names, **options: Path("build"))

    def native(runs: list[Run]) -> list[Result]:
        return [Result(int(0 < run.fault < 4), "FAILED") for run in runs]

    monkeypatch.setattr(instruction_sets, "native", native)
    assert main(monkeypatch, "--faults") == 1
    out = capsys.readouterr().out
    assert out.count("does not notice") == 1
    assert "forced64  natively, FAILED" in out
