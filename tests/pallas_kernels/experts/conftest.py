import jax
import jaxtyping
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Where compiling takes most of the time, the compiler is to hurry."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def untyped(monkeypatch):
    """Without annotations, which only tests enforce and which would find some mistakes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
