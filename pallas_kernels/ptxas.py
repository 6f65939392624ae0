"""Which ptxas, NVIDIA's assembler, Mosaic GPU hands kernels to; the package's comes first.

Mosaic GPU takes the first of ./cuda_sdk_lib/bin, the folders of PATH and /usr/local/cuda/bin.
MOSAIC_GPU_CUDA_ROOT and --xla_gpu_cuda_data_dir steer what XLA itself compiles, and not that. It
looks once a process, at its first kernel: importing this module decides, unless another library's
kernel was compiled before.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

# Older assemblers reuse registers that a wgmma still reads: wrong values, silently.
OLDEST = (13, 3)
_LOCAL, _SYSTEM = "cuda_sdk_lib/bin/ptxas", "/usr/local/cuda/bin/ptxas"


def packaged_toolkit() -> str | None:
    """The folder of the package nvidia-cuda-nvcc, if it is installed: `bin/ptxas` is in it."""
    try:
        found = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = (found.submodule_search_locations or []) if found else []
    return next((folder for folder in folders if (Path(folder) / "bin" / "ptxas").exists()), None)


def select() -> str | None:
    """Puts the package's ptxas first on this process's PATH; the one that Mosaic GPU then finds."""
    if toolkit := packaged_toolkit():
        first = os.path.join(toolkit, "bin")
        others = [x for x in os.environ.get("PATH", "").split(os.pathsep) if x != first]
        os.environ["PATH"] = os.pathsep.join([first, *others])
    found = _LOCAL if os.path.exists(_LOCAL) else shutil.which("ptxas")
    return found or (_SYSTEM if os.path.exists(_SYSTEM) else None)


@functools.cache
def version(ptxas: str) -> tuple[int, ...]:
    """The release of an assembler, such as (13, 3); empty if it does not say."""
    try:
        printed = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    release = re.search(r"release (\d+)\.(\d+)", printed.stdout)
    return tuple(map(int, release.groups())) if release else ()


def why_not() -> str | None:
    """Why the assembler that compiling finds cannot be trusted with the kernels, or None."""
    ptxas = select()
    release = version(ptxas) if ptxas else ()
    if release >= OLDEST:
        return None
    found = f"{'.'.join(map(str, release)) or 'an unknown release'} at {ptxas}" if ptxas else "none"
    mend = f"remove {_LOCAL}" if ptxas == _LOCAL else "pip install 'nvidia-cuda-nvcc>=13.3'"
    return f"it needs ptxas 13.3 or newer, and JAX would use {found}; {mend}"


select()
