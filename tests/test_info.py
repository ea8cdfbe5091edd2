from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

import mmixer_kernels
from mmixer_kernels import info
from mmixer_kernels.engines import names
from mmixer_kernels.environment import VARIABLES


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert info.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_versions_engines_devices_and_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = facts(capsys)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["mmixer_kernels"] == mmixer_kernels.__version__
    assert list(found["engines"]) == list(names())
    for name, state in mmixer_kernels.engines().items():
        assert str(found["engines"][name]).endswith(state.reason)
        assert str(found["engines"][name]).startswith("available" if state.available else "off")
    assert "cpu" in found["devices"]
    assert found["threads"]["torch"] == torch.get_num_threads()


def test_the_extension_tells_how_it_was_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = ModuleType("mmixer_kernels._native")
    native.build_info = lambda: {"compiler": "a compiler"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmixer_kernels._native", native)
    assert facts(capsys)["extension"] == {"compiler": "a compiler"}


def test_an_extension_that_does_not_load_gives_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mmixer_kernels._native", None)
    assert "mmixer_kernels._native" in str(facts(capsys)["extension"]["error"])


def test_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    width = max(len(key) for table in info.collect().values() for key in table)
    assert len(rows) > 10
    assert all(row[2 + width : 4 + width] == "  " and row[4 + width] != " " for row in rows)


def test_every_variable_of_the_environment_is_printed_with_its_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMIXER_ENGINE", "reference")
    assert facts(capsys)["environment"]["MMIXER_ENGINE"] == "reference"
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert "reference (the engine of units" in printed
    monkeypatch.setenv("MMIXER_ENGINE", "fast")
    assert "fast, which is none of auto, cpu" in str(facts(capsys)["environment"]["MMIXER_ENGINE"])
    for variable in VARIABLES:
        line = next(x for x in printed.splitlines() if x.split()[:1] == [variable.name])
        assert variable.meaning.replace("`", "") in line
