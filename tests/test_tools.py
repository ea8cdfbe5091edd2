"""Every cell of the table of tools, on each engine: what it gives equals the reference's equations
in float64, in the way that the table names, or it raises what the table names."""

from __future__ import annotations

from typing import Any

import pytest
import tools
import torch
from tools import Case, Entrance, Error, Tool
from torch.utils import _pytree as pytree

from mmixer_kernels import ops
from mmixer_kernels.engines import names

ENGINES = [name for name in names() if name != "triton"]  # whose interpreter takes minutes
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine; the CUDA engine is emulated."""
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return str(request.param)


@pytest.fixture
def equations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Gets an entry for each call that is computed by equations."""
    calls: list[None] = []
    by_equations = ops._by_equations

    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return by_equations(*arguments)

    monkeypatch.setattr(ops, "_by_equations", counted)
    return calls


CELLS = [
    pytest.param(
        tool,
        entrance,
        id=f"{tool.name}-{entrance.name}",
        marks=pytest.mark.slow if tool.slow else (),
    )
    for tool in tools.TOOLS
    for entrance in tools.ENTRANCES
    if entrance.name in tool.entrances
]


@pytest.mark.parametrize(("tool", "entrance"), CELLS)
def test_cell(tool: Tool, entrance: Entrance, engine: str, equations: list[None]) -> None:
    ours, truth = entrance.modules(engine)
    operands = entrance.operands(), entrance.operands(tools.T + 2, tools.B + 1)
    with torch.no_grad():
        ours(*operands[0])  # so that the way past the dispatcher is known
    outcome = tool.expected(entrance.name)
    if isinstance(outcome, Error):
        with pytest.raises(outcome.kind, match=outcome.match):
            tool.run(Case(entrance, ours, *operands))
        return
    torch.manual_seed(1)
    results = tool.run(Case(entrance, ours, *operands))
    assert bool(equations) == (outcome == tools.EQUATIONS)
    torch.manual_seed(1)
    expected = (tool.truth or tool.run)(Case(entrance, truth, *operands))
    compare(results, expected, tool.tolerance)


def compare(results: Any, expected: Any, tolerance: float) -> None:
    results, expected = pytree.tree_leaves(results), pytree.tree_leaves(expected)
    assert len(results) == len(expected)
    for result, truth in zip(results, expected, strict=True):
        if truth is None:
            assert result is None
            continue
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(result, truth.to(result.dtype), rtol=0, atol=tolerance * scale)


def test_the_document_has_the_table() -> None:
    assert tools.documented()[1] == tools.document(), "python tests/tools.py writes it"
