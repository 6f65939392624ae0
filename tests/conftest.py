"""Eight simulated CPU devices for every test, and tiny models converted from Hugging Face files."""

import atexit
import os
import shutil
import tempfile

# Set before JAX starts. The compiler for absent GPUs is installed, its driver is not.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
# XLA's threads: simulated GPU threads wait for one another, and would wait forever for a free one.
os.environ["NPROC"] = "32"
# Where scripts keep what they compile, instead of the user's own folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxmoe-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.config import Llama4Config
from jaxmoe.mesh import MeshConfig
from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each maps memory, of which a process may have 65,530 parts: thousands of tests need more."""
    yield
    jax.clear_caches()


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


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A model as the Hugging Face files have it, and as this project loads it."""

    hf_config: dict
    tensors: dict[str, np.ndarray]
    config: Llama4Config
    params: dict
    checkpoint: str

    def on(self, mesh) -> dict:
        """The parameters on another mesh."""
        return store.load(self.checkpoint, mesh)[1]


def load_tiny(folder, hf_config, tensors) -> TinyModel:
    """Writes the files, converts them and loads the result onto one device."""
    tiny.write_checkpoint(folder / "hf", hf_config, tensors)
    convert(folder / "hf", folder / "checkpoint")
    config, params = store.load(folder / "checkpoint", one_device())
    return TinyModel(hf_config, tensors, config, params, str(folder / "checkpoint"))


def one_device():
    return MeshConfig().make(jax.devices()[:1])


@pytest.fixture(scope="session")
def scout(tmp_path_factory):
    """Eight layers, chunk 16."""
    config = tiny.scout_like()
    return load_tiny(tmp_path_factory.mktemp("scout"), config, tiny.random_tensors(config, 0))


@pytest.fixture(scope="session")
def maverick(tmp_path_factory):
    """Eight layers, dense and MoE in turn."""
    config = tiny.maverick_like()
    return load_tiny(tmp_path_factory.mktemp("maverick"), config, tiny.random_tensors(config, 1))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Four layers, three local and one global: quick to compile."""
    config = tiny.scout_like(num_hidden_layers=4)
    return load_tiny(tmp_path_factory.mktemp("small"), config, tiny.random_tensors(config, 2))
