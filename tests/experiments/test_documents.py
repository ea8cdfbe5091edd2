"""docs/experiments.md quotes the results that are committed beside it."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "experiments.md").read_text()


@pytest.fixture(scope="module")
def documents():
    paths = sorted((DOCS / "experiments").glob("*/*.json"))
    return {path.relative_to(DOCS): json.loads(path.read_text()) for path in paths}


def test_every_table_is_one_of_the_results(documents):
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    assert len(tables) >= 12
    for table in tables:
        assert any(table.strip() in found["markdown"] for found in documents.values()), table


def test_every_experiment_of_the_pages_has_its_trainings(documents):
    for path, found in documents.items():
        trained = {(t["network"], t["seed"], t["fold"]) for t in found["trainings"]}
        networks = {network["name"] for network in found["networks"]}
        folds = range(5) if found["folds"] else (None,)
        wanted = {(n, s, f) for n in networks for s in found["seeds"] for f in folds}
        assert trained == wanted, path
        assert found["seeds"] == [0, 1, 2], path


def test_pictures_and_pages_exist():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert link.startswith("http") or (DOCS / link).exists(), link
