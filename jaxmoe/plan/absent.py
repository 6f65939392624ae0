"""Devices of accelerators that this machine does not have, good for compiling only.

The compiler is the real one, so its memory analysis is what the hardware would get. GPUs need the
extra `absent-gpu`: the CUDA plugin of jax, without a driver. TPUs need `absent-tpu`: libtpu.
"""

import importlib.util
import os
import string
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import topologies

from jaxmoe.errors import UserError
from pallas_kernels.ptxas import packaged_toolkit

# What XLA wants to know of a GPU, in the text form of its GpuTargetConfigProto.
_HOPPER = string.Template("""
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: $bandwidth device_memory_size: $memory
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "$name"
""")

# libtpu looks for no TPU hosts, and loads beside other processes that use it.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_LOWERED_AS = {"gpu": "cuda"}  # JAX's name of a platform -> that of its lowering rules


def absent_h100s(count: int) -> list[jax.Device]:
    """`count` H100s of one host.

    Raises:
        UserError: if the CUDA plugin is not installed.
    """
    return _hoppers("NVIDIA H100 80GB HBM3", count, bandwidth=3352320000000, memory=84978434048)


def absent_h200s(count: int) -> list[jax.Device]:
    """`count` H200s of one host; their sizes are those of h200.txtpb in XLA's sources.

    Raises:
        UserError: if the CUDA plugin is not installed.
    """
    return _hoppers("NVIDIA H200", count, bandwidth=4800000000000, memory=151397597184)


def _hoppers(name: str, count: int, *, bandwidth: int, memory: int) -> list[jax.Device]:
    _require("jax_plugins.xla_cuda13", "jax-cuda13-plugin", "absent-gpu")
    config = _HOPPER.substitute(name=name, bandwidth=bandwidth, memory=memory)
    topology = topologies.get_topology_desc(
        name, "cuda", target_config=config, topology=f"1x{count}x1"
    )
    return list(topology.devices)


def absent_tpus(topology: str) -> list[jax.Device]:
    """All TPUs of a slice.

    Args:
        topology: generation and chips along each axis, such as "v5p:2x2x1" or "v6e:2x2".

    Raises:
        UserError: if libtpu is not installed, or knows no such slice.
    """
    _require("libtpu", "libtpu", "absent-tpu")
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu knows no topology '{topology}': {error}") from error


def mesh_of(device: jax.Device) -> jax.sharding.Mesh:
    """One device as a mesh; under its abstract mesh, functions are traced for that device."""
    axis_types = (jax.sharding.AxisType.Explicit,)
    return jax.sharding.Mesh(np.array([device]), ("device",), axis_types=axis_types)


def lower_for(device: jax.Device, function: Callable, *arguments) -> jax.stages.Lowered:
    """Lowers a function of ShapeDtypeStructs for one device."""
    mesh = mesh_of(device)
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*placed)
        return traced.lower(lowering_platforms=(_LOWERED_AS.get(device.platform, device.platform),))


def _require(module: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{package} is not installed; run pip install 'jaxmoe[{extra}]'.")


def compiler_options() -> dict[str, str | int]:
    """For `.compile()` on GPUs: no trial runs of kernels, and nvidia-cuda-nvcc's assembler."""
    options: dict[str, str | int] = {"xla_gpu_autotune_level": 0}
    if toolkit := packaged_toolkit():
        options["xla_gpu_cuda_data_dir"] = toolkit
    return options
