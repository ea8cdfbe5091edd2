"""README's examples, and that its table for users of `nn.GRU` has every argument."""

import doctest
import inspect
import re
from pathlib import Path

from torch import nn

from mmixer_kernels import FusedMCUCell, FusedMCUStack

README = Path(__file__).parent.parent / "README.md"


def test_examples():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted
    assert not result.failed


def test_the_table_for_users_of_a_gru_has_every_argument():
    section = README.read_text().split("## If you come from nn.GRU")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    of_gru, ours = (set(re.findall(r"\w+", " ".join(column))) for column in zip(*rows, strict=True))
    for argument in inspect.signature(nn.RNNBase.__init__).parameters:
        if argument not in ("self", "mode", "proj_size"):  # the last is nn.LSTM's
            assert argument in of_gru, argument
    for kind in (FusedMCUStack, FusedMCUCell):
        for argument in inspect.signature(kind).parameters:
            assert argument in ours | of_gru, argument
    for name in (*FusedMCUStack(1, 1, 1).state_dict(), "FusedMCUCell"):
        assert name in ours | {"weight_g_l0", "weight_s_l0"}, name
