"""The device that a function is being traced for, which may be absent from this machine."""

import dataclasses
import re

import jax

# GPUs of compute capability 9.0, by the device names of NVIDIA's driver.
_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
# Data center GPUs of compute capability 8.0 and above, except Hopper.
_AMPERE_ADA_BLACKWELL = re.compile(r"\b(A100|A800|A30|A10G?|A40|L4|L40S?|B200|GB200)\b")


@dataclasses.dataclass(frozen=True)
class Target:
    """The kind of device that a kernel is compiled for.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device_kind: JAX's name, such as "NVIDIA H200" or "TPU v5".
        num_cores: a GPU's streaming multiprocessors, a TPU's cores; None where JAX does not say.
    """

    platform: str
    device_kind: str
    num_cores: int | None

    @property
    def is_hopper(self) -> bool:
        """Whether this is a Hopper GPU, which has wgmma."""
        return self.platform == "gpu" and _HOPPER.search(self.device_kind) is not None

    @property
    def has_cudnn_attention(self) -> bool:
        """Whether this is one of the GPUs for which cuDNN's flash attention is known to exist."""
        other = _AMPERE_ADA_BLACKWELL.search(self.device_kind)
        return self.is_hopper or (self.platform == "gpu" and other is not None)

    def __str__(self) -> str:
        return self.device_kind


def target() -> Target:
    """The device of the current mesh (`jax.set_mesh`), or without a mesh JAX's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(device.platform, device.device_kind, device.num_cores)
    first = jax.devices()[0]
    return Target(first.platform, first.device_kind, getattr(first, "core_count", None))
