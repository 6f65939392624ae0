"""The machines a plan can be made for: by name, or described in a YAML file."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_yaml

RESERVE = 0.05  # of a device's memory; see `Target.reserve_reason`
HOST = 8  # GPUs of one machine
_RANGES = {"reserve": (0, 1), "devices": (1, 2**16)}  # of a described target's numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices of one kind. Figures are each device's, as its vendor publishes them.

    Attributes:
        name: such as `h100x8`.
        devices: how many.
        memory: bytes.
        bandwidth: bytes of its memory it reads a second.
        flops: bfloat16 operations a second, dense.
        interconnect: bytes it sends to the other devices a second.
        compiler: which compiler of absent devices serves it: that of a GPU, such as `h100`, or a
            TPU topology such as `v5p:2x2x2`; None for none.
        reserve: the part of the memory that a program cannot have.
        launch: seconds from the end of one operation of a CUDA graph to the start of the next.
        latency: seconds that a sum of few bytes over the devices takes.
    """

    name: str
    devices: int
    memory: int
    bandwidth: float
    flops: float
    interconnect: float
    compiler: str | None = None
    reserve: float = RESERVE
    launch: float = 0.0
    latency: float = 0.0

    @property
    def limit(self) -> int:
        """Bytes that a program can have."""
        return int(self.memory * (1 - self.reserve))

    @property
    def is_tpu(self) -> bool:
        """Whether it is a slice of TPUs."""
        return ":" in (self.compiler or "")

    @property
    def reserve_reason(self) -> str:
        """What the reserve is for."""
        if self.is_tpu:
            return "for the runtime, its programs and fragmentation"
        return (
            "for the CUDA context, NCCL's buffers and fragmentation; "
            f"run with XLA_PYTHON_CLIENT_MEM_FRACTION={1 - self.reserve:.2f}, the default is 0.75"
        )


# Vendors' figures. NVLink, PCIe and ICI: half of the two-way figure, since a device that sends
# receives. The A100 is that of 80 GB with SXM; the L40S has PCIe only.
_GPUS: dict[str, dict[str, Any]] = {
    "a100": {"memory": 85100068864, "bandwidth": 2.039e12, "flops": 312e12, "interconnect": 300e9},
    "l40s": {"memory": 48305799168, "bandwidth": 0.864e12, "flops": 362e12, "interconnect": 32e9},
    "h100": {"memory": 84978434048, "bandwidth": 3.35e12, "flops": 989e12, "interconnect": 450e9},
    "h200": {"memory": 151397597184, "bandwidth": 4.8e12, "flops": 989e12, "interconnect": 450e9},
    "b200": {"memory": 192000000000, "bandwidth": 8.0e12, "flops": 2250e12, "interconnect": 900e9},
}
# Assumed, from what is published of CUDA graphs and of NCCL over NVLink; not measured here.
_LAUNCHES = {"launch": 1.5e-6, "latency": 10e-6}
_TPUS: dict[str, dict[str, Any]] = {
    "v5p": {"memory": 95 * 2**30, "bandwidth": 2.765e12, "flops": 459e12, "interconnect": 600e9},
    "v6e": {"memory": 32 * 2**30, "bandwidth": 1.64e12, "flops": 918e12, "interconnect": 400e9},
}

# Names as Google's: v5p counts TensorCores, two a chip; v6e counts chips.
_SLICES = {
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"},
}


def known_names() -> list[str]:
    """Every target with a name."""
    gpus = [f"{gpu}x{count}" for gpu in _GPUS for count in (1, 2, 4, 8)]
    return gpus + [f"{tpu}-{size}" for tpu, sizes in _SLICES.items() for size in sizes]


def parse_target(text: str) -> Target:
    """A target by its name, or by the path of a YAML file.

    Raises:
        UserError: for an unknown name, or a file that describes no target.
    """
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    gpu = re.fullmatch(r"(\w+)x(\d+)", text)
    if gpu and gpu[1] in _GPUS and 1 <= int(gpu[2]) <= HOST:
        figures: dict[str, Any] = {**_LAUNCHES, **_GPUS[gpu[1]]}
        return Target(name=text, devices=int(gpu[2]), compiler=gpu[1], **figures)
    tpu, _, size = text.partition("-")
    if size.isdecimal() and int(size) in _SLICES.get(tpu, {}):
        shape = _SLICES[tpu][int(size)]
        return Target(name=text, devices=_chips(shape), compiler=f"{tpu}:{shape}", **_TPUS[tpu])
    raise UserError(
        f"target '{text}' is unknown: there are {', '.join(known_names())}, "
        f"GPUs in any number up to {HOST}, and YAML files that describe another."
    )


def _chips(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x"))


def _read(path: Path) -> Target:
    """A description: the fields of `Target`, by name."""
    content = read_yaml(path)
    fields = {field.name: field for field in dataclasses.fields(Target)}
    if not isinstance(content, dict):
        raise UserError(f"target file {path} holds no mapping; write a line for each field.")
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:80], fields, n=1, cutoff=0)[0]
            raise UserError(
                f"target file {path} has the unknown key '{key!s:.80}'; nearest is '{near}'."
            )
    for name, field in fields.items():
        if name not in content and field.default is dataclasses.MISSING:
            raise UserError(f"target file {path} lacks '{name}'; add it.")
    return Target(**{key: _value(path, key, value) for key, value in content.items()})


def _value(path: Path, key: str, value) -> Any:
    """Numbers must be positive, a reserve below 1."""
    if key in ("name", "compiler"):
        return value if value is None else str(value)
    convert: Callable = int if key in ("devices", "memory") else float
    try:
        number = convert(float(value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    least, most = _RANGES.get(key, (1, 1e18))
    if not least <= number < most:
        raise UserError(
            f"target file {path} gives {key} the value '{value!s:.80}'; write a number, {least} or "
            f"more and less than {most:g}."
        )
    return number


def absent_devices(target: Target) -> list:
    """Compile-only devices of a target.

    Raises:
        UserError: if no compiler serves it, or it is not installed.
    """
    from jaxmoe.plan import absent  # a plan by formula needs no compiler

    if target.is_tpu:
        return absent.absent_tpus(str(target.compiler))
    if target.compiler not in absent.GPUS:
        raise UserError(
            f"--compile knows no compiler for {target.name}: it serves "
            f"{', '.join(absent.GPUS)} and TPUs; leave it out to plan by formula."
        )
    return absent.absent_gpus(target.compiler, target.devices)
