"""The device that a function is being traced for: the mesh's, present or not, or else the first."""

import dataclasses
import re

import jax

# Compute capability 9.0, by the names that NVIDIA's driver gives.
_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
# Those of data centers from 8.0 on, but for Hopper.
_AMPERE_ADA_BLACKWELL = re.compile(r"\b(A100|A800|A30|A10G?|A40|L4|L40S?|B200|GB200)\b")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is compiled for."""

    platform: str  # "cpu", "gpu" or "tpu"
    device_kind: str  # such as "NVIDIA H200" or "TPU v5"
    num_cores: int | None  # of a GPU: its streaming multiprocessors

    @property
    def is_hopper(self) -> bool:
        """Whether it has wgmma."""
        return self.platform == "gpu" and _HOPPER.search(self.device_kind) is not None

    @property
    def has_cudnn_attention(self) -> bool:
        """Whether it is known to be a GPU that cuDNN has flash attention for."""
        other = _AMPERE_ADA_BLACKWELL.search(self.device_kind)
        return self.is_hopper or (self.platform == "gpu" and other is not None)

    def __str__(self) -> str:
        return self.device_kind


def target() -> Target:
    """The device of the current mesh, or JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(device.platform, device.device_kind, device.num_cores)
    first = jax.devices()[0]
    return Target(first.platform, first.device_kind, getattr(first, "core_count", None))
