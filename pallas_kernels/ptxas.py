"""Selects the ptxas, NVIDIA's assembler, that Mosaic GPU compiles kernels with.

Mosaic GPU takes the first ptxas in ./cuda_sdk_lib/bin, the folders of PATH and /usr/local/cuda/bin.
MOSAIC_GPU_CUDA_ROOT and --xla_gpu_cuda_data_dir affect only XLA's own kernels. It looks once per
process, before its first kernel. Importing this module puts the ptxas of the package
nvidia-cuda-nvcc first on PATH, which takes effect unless another library compiled a kernel before.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

# Older releases reuse registers that a wgmma still reads, which gives wrong values silently.
OLDEST = (13, 3)
_LOCAL, _SYSTEM = "cuda_sdk_lib/bin/ptxas", "/usr/local/cuda/bin/ptxas"


def packaged_toolkit() -> str | None:
    """The folder of the package nvidia-cuda-nvcc that holds `bin/ptxas`; None if not installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((folder for folder in folders if (Path(folder) / "bin" / "ptxas").exists()), None)


def select() -> str | None:
    """Puts the package's ptxas first on PATH; returns the path Mosaic GPU will find, or None."""
    if toolkit := packaged_toolkit():
        first = os.path.join(toolkit, "bin")
        others = [x for x in os.environ.get("PATH", "").split(os.pathsep) if x != first]
        os.environ["PATH"] = os.pathsep.join([first, *others])
    path = _LOCAL if os.path.exists(_LOCAL) else shutil.which("ptxas")
    return path or (_SYSTEM if os.path.exists(_SYSTEM) else None)


@functools.cache
def version(ptxas: str) -> tuple[int, ...]:
    """The release of a ptxas, such as (13, 3); empty if it cannot be run or prints none."""
    try:
        printed = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    release = re.search(r"release (\d+)\.(\d+)", printed.stdout)
    return tuple(map(int, release.groups())) if release else ()


def why_not() -> str | None:
    """Says why the ptxas that Mosaic GPU will find cannot compile the kernels; None if it can."""
    ptxas = select()
    release = version(ptxas) if ptxas else ()
    if release >= OLDEST:
        return None
    used = f"{'.'.join(map(str, release)) or 'an unknown release'} at {ptxas}" if ptxas else "none"
    mend = f"remove {_LOCAL}" if ptxas == _LOCAL else "pip install 'nvidia-cuda-nvcc>=13.3'"
    return f"it needs ptxas 13.3 or newer, and JAX would use {used}; {mend}"


select()
