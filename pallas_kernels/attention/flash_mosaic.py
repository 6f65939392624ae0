"""Flash attention on Hopper, differentiable: the forward and backward kernels as one function."""

import dataclasses
import functools
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.masks import Coords, KeyRange
from pallas_kernels.attention.mosaic_backward import BackwardConfig, flash_backward
from pallas_kernels.attention.mosaic_forward import ForwardConfig, flash_forward
from pallas_kernels.attention.residuals import named
from pallas_kernels.choice import Implementation
from pallas_kernels.mosaic import why_not_hopper

HEAD_DIMS = (64, 128)  # of the kernels; zeros fill heads between them up


@dataclasses.dataclass(frozen=True)
class FlashMosaicConfig:
    """Sizes of the kernels."""

    forward: ForwardConfig = dataclasses.field(default_factory=ForwardConfig)
    backward: BackwardConfig = dataclasses.field(default_factory=BackwardConfig)


@dataclasses.dataclass(frozen=True)
class _MosaicCall:
    scale: float
    config: FlashMosaicConfig
    interpret: Any


def why_not(case) -> str | None:
    """Why a call cannot run on these kernels, or None."""
    if case.dtype != "bfloat16":
        return f"it takes bfloat16, not {case.dtype}"
    if not HEAD_DIMS[0] <= case.head_dim <= HEAD_DIMS[-1]:
        return f"it takes head sizes from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, not {case.head_dim}"
    return why_not_hopper(case.interpret)


def config_for(case) -> FlashMosaicConfig:
    """The config tuned for the device, or else one that is good on any Hopper."""
    head_dim = _padded(case.head_dim)
    forward = tuning.lookup("flash_forward", head_dim=head_dim) or {}
    backward = tuning.lookup("flash_backward", head_dim=head_dim) or {}
    return FlashMosaicConfig(ForwardConfig(**forward), BackwardConfig(**backward))


def flash_mosaic(q, k, v, q_range: KeyRange, k_coords: Coords, case, config: FlashMosaicConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S]."""
    static = _MosaicCall(case.scale, config, case.interpret)
    q, k, v = (pad_axis(x, 3, _padded(case.head_dim)) for x in (q, k, v))
    out, lse = _flash(static, q, k, v, q_range, k_coords)
    return out[..., : case.head_dim], lse


def _padded(head_dim: int) -> int:
    """The size of the kernels' heads that hold heads of a size."""
    return next(size for size in HEAD_DIMS if size >= head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _MosaicCall, q, k, v, q_range: KeyRange, k_coords: Coords):
    options = {"scale": static.scale, "interpret": static.interpret}
    return flash_forward(q, k, v, q_range, k_coords, config=static.config.forward, **options)


def _forward(static: _MosaicCall, q, k, v, q_range, k_coords):
    out, lse = named(*_flash(static, q, k, v, q_range, k_coords))
    return (out, lse), ((q, k, v, out, lse), q_range, k_coords)


def _backward(static: _MosaicCall, residuals, cotangents):
    (saved, q_range, k_coords), (d_out, d_lse) = residuals, cotangents
    options = {"scale": static.scale, "interpret": static.interpret}
    gradients = flash_backward(
        saved, d_out, d_lse, q_range, k_coords, config=static.config.backward, **options
    )
    return (*gradients, None, None)


_flash.defvjp(_forward, _backward)

IMPLEMENTATION = Implementation("mosaic_gpu", why_not, flash_mosaic, FlashMosaicConfig, config_for)
