import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Compiling takes most of the time here, so the compiler is to hurry."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def untyped(monkeypatch):
    """Without annotations, which only tests enforce and which would find some mistakes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
