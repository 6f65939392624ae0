import pytest

from jaxmoe.checkpoint.mapping import tensors
from jaxmoe.checkpoint.zarr import arrays


@pytest.fixture
def small_blocks(monkeypatch):
    """Writes every tensor in several blocks of several chunks, as those of real sizes are."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1000)
