import pytest


@pytest.fixture(autouse=True, scope="module")
def hurry(quick_compilation):
    """All tests here compile much and compute little."""
