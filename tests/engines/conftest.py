import pytest

pytest.register_assert_rewrite("contract")


@pytest.fixture(autouse=True)
def fresh_memory(nan_filled_memory: None) -> None:
    """Every test of an engine finds NaN in fresh memory."""
