"""Detects accelerators, so that JAX does not try to start those that are absent.

The packages that compile for absent accelerators are the same that drive present ones. Where they
are installed on a machine without accelerators, JAX tries each, and each prints errors to stderr
before JAX falls back to the CPU.
"""

import ctypes
import functools
import importlib
import os
import pkgutil
from importlib import metadata
from pathlib import Path

import jax

_GOOGLE = "0x1ae0"  # Google's PCI vendor id, which TPUs have
_PCI = Path("/sys/bus/pci/devices")
_NAMED_BY_USER = {"PJRT_NAMES_AND_LIBRARY_PATHS", "JAX_FORCE_TPU_INIT"}


@functools.cache
def has_cuda_driver() -> bool:
    """Whether NVIDIA's driver, which every use of a GPU needs, is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def has_tpu() -> bool:
    """Whether a TPU is on the PCI bus, as in Google Cloud's TPU VMs."""
    try:
        return any(file.read_text().strip() == _GOOGLE for file in _PCI.glob("*/vendor"))
    except OSError:
        return False


def leave_out_absent() -> None:
    """Sets JAX's platform to the CPU where no accelerator is present.

    Does nothing if the user chose a platform, or if a JAX plugin other than CUDA's is installed.
    """
    if not has_cuda_driver():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if jax.config.jax_platforms or has_cuda_driver() or has_tpu():
        return
    if all(name.startswith("xla_cuda") for name in _plugins()):
        jax.config.update("jax_platforms", "cpu")


def _plugins() -> set[str]:
    """Names of the platform plugins that JAX will load, found where JAX looks for them."""
    names = {plugin.name for plugin in metadata.entry_points(group="jax_plugins")}
    try:
        folders = importlib.import_module("jax_plugins").__path__
    except ImportError:
        folders = []
    names |= {module.name for module in pkgutil.iter_modules(folders)}
    by_user = any(map(os.environ.get, _NAMED_BY_USER))
    return names | ({"named by the user"} if by_user else set())
