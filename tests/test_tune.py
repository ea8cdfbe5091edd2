"""Tuning, by Triton's interpreter on this CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmixer_kernels import tune, tuning
from mmixer_kernels.engines import triton as engine
from mmixer_kernels.engines import triton_tuning
from mmixer_kernels.engines.protocol import EngineState
from mmixer_kernels.engines.triton_tuning import Configuration, Trial

triton = pytest.importorskip("triton")

CPU = torch.device("cpu")
SMALL = [Configuration(16, 16, 4, 2), Configuration(32, 16, 4, 2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MMIXER_CACHE", str(tmp_path / "cache"))
    triton_tuning._kept.cache_clear()
    yield tmp_path / "cache" / "triton.json"
    triton_tuning._kept.cache_clear()


def configuration(hidden: int = 20, dtype: torch.dtype = torch.float32) -> Configuration:
    return triton_tuning.configuration(hidden, dtype, CPU)


def test_without_tuning_a_fixed_default() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert configuration(512, dtype) == triton_tuning.default(dtype)
        assert triton_tuning.candidates(dtype)[0] == triton_tuning.default(dtype)


def test_the_fastest_that_works_is_kept_for_its_size_and_dtype(cache: Path) -> None:
    candidates = triton_tuning.candidates(torch.float32)
    times = iter([3.0, RuntimeError("out of shared memory"), 1.0, *[2.0] * len(candidates)])

    def measure() -> float:
        seconds = next(times)
        if isinstance(seconds, Exception):
            raise seconds
        return seconds

    trials = triton_tuning.tune(20, torch.float32, CPU, measure)
    assert trials[0] == Trial(candidates[2], 1.0, None)
    assert trials[-1] == Trial(candidates[1], None, "out of shared memory")
    assert len(trials) == len(candidates) <= 8
    assert configuration() == candidates[2]
    assert configuration(21) == triton_tuning.default(torch.float32)
    assert configuration(20, torch.float64) == triton_tuning.default(torch.float64)
    assert list(json.loads(cache.read_text()).values()) == [list(candidates[2])]


def test_nothing_is_kept_when_nothing_works(cache: Path) -> None:
    def measure() -> float:
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="no configuration could be used; the first failed: no"):
        triton_tuning.tune(20, torch.float32, CPU, measure)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', '{"a": [1, 2]}'])
def test_a_damaged_file_is_named_and_the_default_taken(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"triton\.json cannot be read.*delete it or tune"):
        assert configuration() == triton_tuning.default(torch.float32)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is not set: there is a GPU")
    monkeypatch.setattr(engine, "state", lambda device=None: EngineState(True, "interpreted"))
    monkeypatch.setattr(engine, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(triton_tuning, "candidates", lambda dtype: SMALL)
    monkeypatch.setattr(tuning, "ROUNDS", 1)


SIZES = ["--hidden-size", "20", "--batch-size", "2", "--steps", "2", "--weight-sets", "1"]
COMMAND = [*SIZES, "--dtype", "float32", "--device", "cpu"]


@pytest.mark.usefixtures("interpreted")
def test_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if tune.main(COMMAND) != 0:
        assert "0-dimensional arrays" in (error := capsys.readouterr().err), error
        pytest.skip("this triton's interpreter does not go with this numpy")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("BLOCK_N ") and line.endswith(" us") for line in lines[:2])
    assert lines[2] == f"the first is kept in {cache}"
    assert configuration() in SMALL


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_result_is_not_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tuning.mcu_group

    def wrong(*arguments: Any, engine: str, **options: Any) -> Any:
        output, h_n = inner(*arguments, engine="reference", **options)
        return (output * 1.001 if engine == "triton" else output), h_n

    monkeypatch.setattr(tuning, "mcu_group", wrong)
    assert tune.main(COMMAND) == 2
    assert "its relative error is" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(SIZES) == 2
    expected = "error: the triton engine cannot run here: torch finds no GPU or driver\n"
    assert capsys.readouterr().err == expected
