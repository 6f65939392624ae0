"""Which implementations a forward pass runs on, and what each attention tells its kernels."""

import dataclasses
from typing import Any, NamedTuple

from pallas_kernels.attention import Mask


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementations by name; None takes the fastest that serves each call.

    Naming any turns the fused kernels of decode steps off. A name that does not serve a call is
    an error that says why; the functions of `pallas_kernels` list their names.

    Attributes:
        experts: for the products with experts' matrices, as in `grouped_matmul`.
        dispatch: for moving tokens to their experts and back, as in `dispatch` and `combine`.
        attention: for attention to new tokens and to the cache, as in `decode_attention`;
            "mosaic_tpu" stands for "splash" where new tokens attend to each other.
        interpret: `plgpu.InterpretGPUParams()` or `pltpu.InterpretParams()` runs kernels without
            their hardware.
    """

    experts: str | None = None
    dispatch: str | None = None
    attention: str | None = None
    interpret: Any = None

    @property
    def fastest(self) -> bool:
        """Whether none is named."""
        return not (self.experts or self.dispatch or self.attention)


FASTEST = Kernels()


class AttentionOptions(NamedTuple):
    """What all calls of `flash_attention` and `decode_attention` of one layer share.

    Attributes:
        scale: multiplies the scores.
        mask: which keys a query sees.
        implementation: by name; None takes the fastest that serves each call.
        interpret: runs kernels without their hardware.
    """

    scale: float
    mask: Mask
    implementation: str | None = None
    interpret: Any = None

    def of_new_tokens(self) -> dict[str, Any]:
        """The arguments of `flash_attention`, which calls its kernel for TPUs "splash"."""
        options = self._asdict()
        if self.implementation == "mosaic_tpu":
            options["implementation"] = "splash"
        return options
