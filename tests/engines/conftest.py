import pytest


@pytest.fixture(autouse=True)
def fresh_memory(nan_filled_memory: None) -> None:
    """Every test of an engine."""
