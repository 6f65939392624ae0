"""Devices of accelerators that this machine does not have, good for compiling only.

The compiler is the real one, so its memory analysis is what the hardware would get. Needs the extra
`absent-gpu`: the CUDA plugin of jax, without a driver.
"""

import importlib.util
from pathlib import Path

import jax
from jax.experimental import topologies

from jaxmoe.errors import UserError

# What XLA wants to know of a GPU, in the text form of its GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def absent_h100s(count: int) -> list[jax.Device]:
    """`count` H100s of one host.

    Raises:
        UserError: if the CUDA plugin is not installed.
    """
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError("jax-cuda13-plugin is not installed; run pip install 'jaxmoe[absent-gpu]'.")
    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=_H100, topology=f"1x{count}x1"
    )
    return list(topology.devices)


def compiler_options() -> dict[str, str | int]:
    """For `.compile()`: no kernels are tried out, and nvidia-cuda-nvcc's assembler is used."""
    options: dict[str, str | int] = {"xla_gpu_autotune_level": 0}
    found = importlib.util.find_spec("nvidia.cu13")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "bin" / "ptxas").exists():
            options["xla_gpu_cuda_data_dir"] = folder
    return options
