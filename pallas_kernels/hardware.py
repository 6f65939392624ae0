"""Which accelerators this machine may have, so that JAX does not look for others in vain.

The compilers for absent accelerators are the packages that drive present ones. Where those are
installed and nothing is there, JAX tries each, and each complains on stderr before the CPU is used.
"""

import ctypes
import functools
import importlib
import os
import pkgutil
from importlib import metadata
from pathlib import Path

import jax

_GOOGLE = "0x1ae0"  # the PCI vendor of TPUs
_PCI = Path("/sys/bus/pci/devices")
_NAMED_BY_USER = {"PJRT_NAMES_AND_LIBRARY_PATHS", "JAX_FORCE_TPU_INIT"}


@functools.cache
def has_cuda_driver() -> bool:
    """Whether NVIDIA's driver is installed, without which no process can use a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def has_tpu() -> bool:
    """Whether a TPU is on the PCI bus, as in the virtual machines of Google's cloud."""
    try:
        return any(file.read_text().strip() == _GOOGLE for file in _PCI.glob("*/vendor"))
    except OSError:
        return False


def leave_out_absent() -> None:
    """Chooses the CPU where JAX would end up after complaints; a choice of the user's stays."""
    if not has_cuda_driver():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if jax.config.jax_platforms or has_cuda_driver() or has_tpu():
        return
    if all(name.startswith("xla_cuda") for name in _plugins()):
        jax.config.update("jax_platforms", "cpu")


def _plugins() -> set[str]:
    """What JAX looks for besides TPUs on the bus, found where it looks."""
    found = {plugin.name for plugin in metadata.entry_points(group="jax_plugins")}
    try:
        folders = importlib.import_module("jax_plugins").__path__
    except ImportError:
        folders = []
    found |= {module.name for module in pkgutil.iter_modules(folders)}
    named = any(map(os.environ.get, _NAMED_BY_USER))
    return found | ({"named by the user"} if named else set())
