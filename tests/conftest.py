"""Eight simulated CPU devices for every test, and tiny models converted from Hugging Face files."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Set before JAX starts. The compiler for absent GPUs is installed, its driver is not.
ON_GPU = os.environ.get("JAXMOE_TEST_GPU", "0") != "0"
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
else:  # which several workers share
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# XLA's threads: simulated GPU threads wait for one another, and would wait forever for a free one.
os.environ["NPROC"] = "32"
# Compiling takes most of the time. So the CPU's programs are compiled in a hurry, unless the
# variable below says otherwise: without LLVM's costly passes, by XLA's older and much quicker
# emitters, in one piece each.
HURRIED = not ON_GPU and os.environ.get("JAXMOE_FULL_COMPILATION", "0") == "0"
if HURRIED:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
# And once: this process, its workers, the scripts that they start and later runs share one folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = Path(__file__).parents[1] / "build" / "compiled-by-tests"
    if sum(f.stat().st_size for f in COMPILED.glob("*")) > 1 << 30:  # mostly of former code
        shutil.rmtree(COMPILED)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# What else scripts keep goes here, instead of the user's own folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxmoe-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import dataclasses
import gc

import jax
import jaxtyping
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from tests.annotations import quick_jaxtyped

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.jaxtyped = quick_jaxtyped  # before the code is imported, which the hook decorates

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.config import Llama4Config
from jaxmoe.mesh import MeshConfig
from tests import tiny

# Tracing makes many objects, and the collector need not look at all modules each time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


# Marks of tests that look at programs, and of those that run them for longer than they compile.
READS_COMPILED = ("absent_gpu", "absent_tpu", "reads_compiled")
RUNS_LONG = "runs_long"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks tests of kernels by the implementation among their parameters.

    Interpreters are slow: `make test` runs the first case of each test in them.
    """
    begun = set()
    for item in items:
        case = getattr(getattr(item, "callspec", None), "id", "")
        for implementation in ("mosaic_gpu", "mosaic_tpu"):
            if implementation not in case:
                continue
            if implementation == "mosaic_gpu":
                item.add_marker("hopper")
            test = item.nodeid.partition("[")[0], implementation
            if test in begun:
                item.add_marker("slow")
            begun.add(test)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each maps memory, of which a process may have 65,530 parts: thousands of tests need more."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def full_compilation(request):
    """Programs that a test looks at, or runs for long, are those that users get."""
    reads = any(map(request.node.get_closest_marker, READS_COMPILED))
    if not reads and not request.node.get_closest_marker(RUNS_LONG):
        yield
        return
    _compile(hurried=False, kept=not reads)
    yield
    _compile(hurried=HURRIED, kept=True)


def _compile(*, hurried: bool, kept: bool):
    jax.config.update("jax_disable_most_optimizations", hurried)
    jax.config.update("jax_enable_compilation_cache", kept)
    reset_cache()  # which has read that setting


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
    """A local and a global layer: quick to compile."""
    config = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2)
    return load_tiny(tmp_path_factory.mktemp("small"), config, tiny.random_tensors(config, 2))
