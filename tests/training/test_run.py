from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmixer_kernels import train
from mmixer_kernels.data import SyntheticOptions
from mmixer_kernels.errors import UserError
from mmixer_kernels.training import parsing, result
from mmixer_kernels.training.run import check_data

MOMENTS = {"a": ([3.0, -1e-9], [2.0, 1.0]), "b": ([1e6], [1e-3])}


def identity(**changes: Any) -> dict[str, Any]:
    return {"modalities": ["a", "b"], "moments": {**MOMENTS, **changes}}


@pytest.mark.parametrize(
    ("changes", "agree"),
    [
        ({}, True),
        ({"a": ([3.0 + 1e-14, -1.0001e-9], [2.0, 1.0 - 1e-15])}, True),
        ({"a": ([3.0, 1e-7], [2.0, 1.0])}, False),
        ({"a": ([3.0, -1e-9], [2.0, 1.0 + 1e-7])}, False),
        ({"b": ([1e6 + 1e-2], [1e-3])}, False),
    ],
)
def test_moments_of_a_data_set_agree_to_rounding(changes: dict[str, Any], agree: bool) -> None:
    """Sums of the same samples differ with the number of threads and with the processor."""
    saved, now = identity(), identity(**changes)
    if agree:
        check_data(saved, now, Path("best.pt"))
    else:
        with pytest.raises(UserError, match=r"not that of best\.pt: .* another mean or standard"):
            check_data(saved, now, Path("best.pt"))
    raw = {**saved, "moments": None}
    check_data(raw, raw, Path("best.pt"))
    with pytest.raises(UserError, match=r"another mean or standard"):
        check_data(raw, saved, Path("best.pt"))


def test_sampling_by_class_needs_samples_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = SyntheticOptions.load

    def load(self: SyntheticOptions, root: Path | None, seed: int) -> Any:
        data = inner(self, root, seed)

        class Redrawn(type(data.train)):  # type: ignore[misc]
            """Clips of which each epoch has others, as `watch` draws its windows."""

            def plain(self) -> Any:
                return data.test

        data.train.__class__ = Redrawn
        return data

    monkeypatch.setattr(SyntheticOptions, "load", load)
    arguments = ["--samples", "32", "--output", str(tmp_path / "run"), "--loader.sampling"]
    assert train.main([*arguments, "balanced"]) == 2
    assert "--loader.sampling must be shuffled for synthetic, whose" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_way_of_making_classes_even_is_enough() -> None:
    both = ["--loss.class-weights", "balanced", "--loader.sampling", "balanced"]
    with pytest.raises(UserError, match=r"--loss\.class-weights must be none with --loader"):
        parsing.parse(both, "train")


def test_the_device_is_told_with_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for given, device, engine, expected in (
        (["--device", "cuda"], "cuda", "cuda", "device cuda (NVIDIA H200), engine cuda, float32"),
        (["--device", "cpu"], "cpu", "cpu", "device cpu (2 threads, AVX2), engine cpu, float32"),
        ([], "cpu", "cpu", "device cpu (auto, 2 threads, AVX2), engine cpu, float32"),
        (
            ["--device", "cpu", "--model.unit", "gru", "--precision", "bfloat16"],
            *("cpu", None, "device cpu (2 threads, AVX2), PyTorch's gru, bfloat16"),
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
            chosen = parsing.parse(given, "train")
        assert result.describe_device(chosen, torch.device(device), engine) == expected
