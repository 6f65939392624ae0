"""The hardware that a plan can be made for: known by name, or described in a YAML file."""

import dataclasses
import math
from typing import Annotated, Any

from jaxmoe.errors import UserError
from jaxmoe.fields import Range, read_fields
from jaxmoe.parsing import read_yaml

RESERVE = 0.05  # the fraction of a device's memory that is kept; see `Target.reserve_reason`
HOST = 8  # the most GPUs of one machine
MOST_HOSTS = 64
_COUNTS = [str(count) for count in range(1, HOST + 1)]
_HOSTS = [str(hosts) for hosts in range(2, MOST_HOSTS + 1)]
_Rate = Annotated[float, Range(1.0, 1e20)]
_Seconds = Annotated[float, Range(0.0, 1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A number of devices of one kind, with each device's figures as its vendor publishes them.

    Attributes:
        name: the target's name, such as `h100x8`.
        devices: how many devices.
        memory: bytes of memory.
        bandwidth: bytes per second from memory.
        flops: dense bfloat16 operations per second.
        interconnect: bytes per second that it can send to other devices of its host.
        compiler: what to compile for: a GPU such as `h100`, or a TPU topology such as
            `v5p:2x2x2`; None if no compiler serves it.
        reserve: the fraction of the memory that a program cannot use.
        launch: seconds from the end of one operation of a CUDA graph to the start of the next.
        latency: seconds that an all-reduce of a few bytes over the devices of a host takes.
        hosts: how many hosts the devices are on, as many on each; a TPU slice counts as one.
        between_hosts: bytes per second that a device can send to other hosts.
        latency_between: seconds that are added for each doubling of the hosts of an all-reduce.
    """

    name: str
    devices: Annotated[int, Range(1, 2**20)]
    memory: Annotated[int, Range(1, 2**50)]
    bandwidth: _Rate
    flops: _Rate
    interconnect: _Rate
    compiler: str | None = None
    reserve: Annotated[float, Range(0.0, 0.99)] = RESERVE
    launch: _Seconds = 0.0
    latency: _Seconds = 0.0
    hosts: Annotated[int, Range(1, 2**16)] = 1
    between_hosts: _Rate | None = None
    latency_between: _Seconds = 0.0

    def __post_init__(self):
        if self.devices % self.hosts:
            raise UserError(
                f"target {self.name} has {self.devices} devices on {self.hosts} hosts; give each "
                "host as many."
            )
        if self.hosts > 1 and self.between_hosts is None:
            raise UserError(
                f"target {self.name} has {self.hosts} hosts; add 'between_hosts', the bytes a "
                "second that a device sends to other hosts."
            )

    @property
    def devices_a_host(self) -> int:
        """How many devices a host has."""
        return self.devices // self.hosts

    @property
    def between(self) -> float:
        """Bytes per second that a device can send over the slowest link."""
        return self.interconnect if self.between_hosts is None else self.between_hosts

    @property
    def limit(self) -> int:
        """Bytes of a device's memory that a program can use."""
        return int(self.memory * (1 - self.reserve))

    @property
    def is_tpu(self) -> bool:
        """Whether the target is a TPU slice."""
        return ":" in (self.compiler or "")

    @property
    def platform(self) -> str:
        """JAX's name of its devices: `tpu` or `gpu`."""
        return "tpu" if self.is_tpu else "gpu"

    @property
    def reserve_reason(self) -> str:
        """What the reserved memory is for, in words."""
        if self.is_tpu:
            return "for the runtime, its programs and fragmentation"
        return (
            "for the CUDA context, NCCL's buffers and fragmentation; "
            f"run with XLA_PYTHON_CLIENT_MEM_FRACTION={1 - self.reserve:.2f}, the default is 0.75"
        )


# Vendors' figures. NVLink, PCIe and ICI rates are half of the bidirectional ones, since a device
# sends and receives at once. The A100 is the SXM model with 80 GB; the L40S has PCIe only.
_GPUS: dict[str, dict[str, Any]] = {
    "a100": {"memory": 85100068864, "bandwidth": 2.039e12, "flops": 312e12, "interconnect": 300e9},
    "l40s": {"memory": 48305799168, "bandwidth": 0.864e12, "flops": 362e12, "interconnect": 32e9},
    "h100": {"memory": 84978434048, "bandwidth": 3.35e12, "flops": 989e12, "interconnect": 450e9},
    "h200": {"memory": 151397597184, "bandwidth": 4.8e12, "flops": 989e12, "interconnect": 450e9},
    "b200": {"memory": 192000000000, "bandwidth": 8.0e12, "flops": 2250e12, "interconnect": 900e9},
}
# Assumed from published figures of CUDA graphs, and of NCCL over NVLink and InfiniBand; not
# measured here.
_LAUNCHES = {"launch": 1.5e-6, "latency": 10e-6}
_BETWEEN = {"latency_between": 10e-6}
# Of NVIDIA's DGX systems: InfiniBand of 200 or 400 Gb/s a GPU.
_NETWORKS = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}
_TPUS: dict[str, dict[str, Any]] = {
    "v5p": {"memory": 95 * 2**30, "bandwidth": 2.765e12, "flops": 459e12, "interconnect": 600e9},
    "v6e": {"memory": 32 * 2**30, "bandwidth": 1.64e12, "flops": 918e12, "interconnect": 400e9},
}
_TPU_KINDS = {"tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e", "tpu v6e": "v6e"}

# TPU slices by Google's names: v5p counts TensorCores, two per chip; v6e counts chips.
_SLICES = {
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"},
}


def known_names() -> list[str]:
    """The names of the targets that a search considers."""
    gpus = [f"{gpu}x{count}" for gpu in _GPUS for count in (1, 2, 4, 8)]
    gpus += [f"{gpu}x{HOST}x{hosts}" for gpu in _NETWORKS for hosts in (2, 4, 8)]
    return gpus + [f"{tpu}-{size}" for tpu, sizes in _SLICES.items() for size in sizes]


def parse_target(text: str) -> Target:
    """Reads a target: its name, or the path of a YAML file that describes it.

    Raises:
        UserError: for an unknown name, or a file that describes no target.
    """
    if text.endswith((".yaml", ".yml")):
        return read_fields(Target, read_yaml(text), f"target file {text}")
    gpu, count, hosts = (*text.split("x", 2), "1", "1")[:3]
    if gpu in _GPUS and count in _COUNTS:
        figures: dict[str, Any] = {**_LAUNCHES, **_GPUS[gpu]}
        if hosts in _HOSTS and gpu in _NETWORKS:
            figures |= {**_BETWEEN, "hosts": int(hosts), "between_hosts": _NETWORKS[gpu]}
        if hosts == "1" or "hosts" in figures:
            devices = int(count) * int(hosts)
            return Target(name=text, devices=devices, compiler=gpu, **figures)
    tpu, _, size = text.partition("-")
    if size.isdecimal() and int(size) in _SLICES.get(tpu, {}):
        shape = _SLICES[tpu][int(size)]
        return Target(name=text, devices=_chips(shape), compiler=f"{tpu}:{shape}", **_TPUS[tpu])
    of_one_host = ", ".join(name for name in known_names() if name.count("x") < 2)
    raise UserError(
        f"target {text!r:.80} is unknown: there are {of_one_host}, GPUs in any number up to "
        f"{HOST} on up to {MOST_HOSTS} hosts as in h100x8x2, and YAML files that describe another."
    )


def _chips(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x"))


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device by the name that JAX gives its kind.

    Returns:
        None for a device that no target has, such as a CPU or a GPU's PCIe variant.
    """
    kind = device_kind.lower()
    if kind in _TPU_KINDS:
        return _TPUS[_TPU_KINDS[kind]]["flops"]
    words = set() if "pcie" in kind else set(kind.split())
    return next((figures["flops"] for gpu, figures in _GPUS.items() if gpu in words), None)


def absent_devices(target: Target) -> list:
    """Compile-only JAX devices of a target.

    Raises:
        UserError: if no compiler serves it, or it is not installed.
    """
    from pallas_kernels.compile import absent  # not imported for plans by formula

    try:
        if target.is_tpu:
            return absent.absent_tpus(str(target.compiler))
        if target.compiler in absent.GPUS:
            return absent.absent_gpus(target.compiler, target.devices, target.hosts)
    except absent.CompilerError as error:
        raise UserError(str(error)) from error
    raise UserError(
        f"--compile knows no compiler for {target.name}: it serves "
        f"{', '.join(absent.GPUS)} and TPUs; leave it out to plan by formula."
    )
