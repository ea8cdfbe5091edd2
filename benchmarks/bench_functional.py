"""N modalities of an M-Mixer in one call of the engine beside one call for each."""

from __future__ import annotations

import problems
import pytest
import torch
from conftest import Compare
from problems import Group, Size
from torch import Tensor

from mmixer_kernels import functional
from mmixer_kernels.comparison.passes import PASSES, contender

SIZE = Size(64, 8, 256)
MODALITIES = 3


@pytest.mark.parametrize("passes", PASSES)
def test_mcu_group(compare: Compare, passes: str, threads: int) -> None:
    cpu = torch.device("cpu")
    error = problems.check_group(SIZE, MODALITIES, "cpu", cpu, threads)
    group = Group.random(SIZE, MODALITIES, cpu)

    def call(part: Group) -> Tensor:
        return functional.mcu_group(*part, engine="cpu")[0]

    single = [
        Group([input], [context], [weights])
        for input, context, weights in zip(group.inputs, group.contexts, group.weights, strict=True)
    ]
    every, first = (list(part.operands().values()) for part in (group, single[0]))
    contenders = [
        contender(f"one call of N = {MODALITIES}", lambda *_: call(group), every, passes),
        contender(
            f"{MODALITIES} calls of N = 1", lambda *_: [call(x) for x in single], every, passes
        ),
        contender("one call of N = 1", lambda *_: call(single[0]), first, passes),
    ]
    table = f"functional.mcu_group, N = {MODALITIES}, {passes}"
    compare(table, str(SIZE), contenders, threads=threads, error=error)
