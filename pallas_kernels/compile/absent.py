"""Compile-only devices: JAX devices of accelerators that this machine does not have.

Programs are compiled by the same compiler as on the hardware, so that its memory analysis holds
there. GPUs need the extra `absent-gpu`: jax's CUDA plugin, without a driver. TPUs need the extra
`absent-tpu`: libtpu.
"""

import functools
import importlib.util
import os
import string
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.compile.errors import CompilerError
from pallas_kernels.ptxas import packaged_toolkit

# The description of a GPU that XLA compiles for, in the text format of its GpuTargetConfigProto.
_GPU = string.Template("""
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: $shared threads_per_core_limit: $threads core_count: $cores
  fpus_per_core: $fpus block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 l2_cache_size: $l2 clock_rate_ghz: $clock
  shared_memory_per_block_optin: $optin
  cuda_compute_capability { major: $major minor: $minor } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: $bandwidth device_memory_size: $memory
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "$name"
""")

# Sizes are those of XLA's sources, xla/backends/gpu/target_config/specs. The L40S is not there: its
# sizes are NVIDIA's published ones of the chip AD102.
_HOPPER = {
    "major": 9, "minor": 0, "cores": 132, "fpus": 128, "threads": 2048, "clock": 1.98,
    "l2": 52428800, "shared": 233472, "optin": 232448,
}  # fmt: skip
_GPUS: dict[str, dict] = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "cores": 108, "fpus": 64,
        "threads": 2048, "clock": 1.41, "l2": 41943040, "shared": 167936, "optin": 166912,
        "bandwidth": 2039040000000, "memory": 85100068864,
    },
    "l40s": {
        "name": "NVIDIA L40S", "major": 8, "minor": 9, "cores": 142, "fpus": 128,
        "threads": 1536, "clock": 2.52, "l2": 100663296, "shared": 102400, "optin": 101376,
        "bandwidth": 864000000000, "memory": 48305799168,
    },
    "h100": {
        "name": "NVIDIA H100 80GB HBM3", **_HOPPER,
        "bandwidth": 3352320000000, "memory": 84978434048,
    },
    "h200": {"name": "NVIDIA H200", **_HOPPER, "bandwidth": 4800000000000, "memory": 151397597184},
    "b200": {
        "name": "NVIDIA B200", "major": 10, "minor": 0, "cores": 148, "fpus": 128,
        "threads": 2048, "clock": 1.965, "l2": 132644864, "shared": 233472, "optin": 232448,
        "bandwidth": 7672320000000, "memory": 191514411008,
    },
}  # fmt: skip
GPUS = tuple(_GPUS)

# Keeps libtpu from looking for TPU hosts and from refusing to load into several processes.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_LOWERED_AS = {"gpu": "cuda"}  # a device's platform -> the platform name of JAX's lowering rules


def absent_gpus(kind: str, count: int, hosts: int = 1) -> list[jax.Device]:
    """Compile-only devices for `count` GPUs.

    Args:
        kind: one of `GPUS`, such as "a100".
        count: how many.
        hosts: on how many hosts, each with as many.

    Raises:
        CompilerError: if the CUDA plugin is not installed.
    """
    _require("jax_plugins.xla_cuda13", "jax-cuda13-plugin", "absent-gpu")
    described = _GPUS[kind]
    topology = topologies.get_topology_desc(
        described["name"],
        "cuda",
        target_config=_GPU.substitute(described),
        topology=f"1x{count}x1" if hosts == 1 else f"1x{hosts}x{count // hosts}",
    )
    return list(topology.devices)


absent_h100s = functools.partial(absent_gpus, "h100")
absent_h200s = functools.partial(absent_gpus, "h200")


def absent_tpus(topology: str) -> list[jax.Device]:
    """Compile-only devices for all TPUs of a slice.

    Args:
        topology: generation and chips along each axis, such as "v5p:2x2x1" or "v6e:2x2".

    Raises:
        CompilerError: if libtpu is not installed, or knows no such slice.
    """
    _require("libtpu", "libtpu", "absent-tpu")
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise CompilerError(f"libtpu knows no topology '{topology}': {error}") from error


def mesh_of(device: jax.Device) -> jax.sharding.Mesh:
    """A mesh of one device; functions traced under its abstract mesh are traced for that device."""
    axis_types = (jax.sharding.AxisType.Explicit,)
    return jax.sharding.Mesh(np.array([device]), ("device",), axis_types=axis_types)


def lower_for(device: jax.Device, function: Callable, *arguments) -> jax.stages.Lowered:
    """Lowers a function for one device, present or absent.

    Args:
        device: the device.
        function: the function to jit.
        *arguments: ShapeDtypeStructs, or pytrees of them.
    """
    mesh = mesh_of(device)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*placed)
        return traced.lower(lowering_platforms=(_LOWERED_AS.get(device.platform, device.platform),))


def _require(module: str, package: str, extra: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # raised if the module's parent package is absent
        spec = None
    if spec is None:
        raise CompilerError(f"{package} is not installed; run pip install 'jaxmoe[{extra}]'.")


def compiler_options() -> dict[str, str | int]:
    """XLA options for `.compile()` on absent GPUs: no autotuning, nvidia-cuda-nvcc's assembler."""
    options: dict[str, str | int] = {"xla_gpu_autotune_level": 0}
    if toolkit := packaged_toolkit():
        options["xla_gpu_cuda_data_dir"] = toolkit
    return options
