"""Fixtures: photographs that a package ships, and what transformers makes of them."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of dog.jpg and pasta.jpeg, in a package that is not imported."""
    spec = find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the photographs are missing: pip install llama-models")
    return Path(spec.submodule_search_locations[0], "resources")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("golden.npz")) as file:
        return dict(file)
