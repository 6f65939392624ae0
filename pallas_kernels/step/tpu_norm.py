"""A residual sum and its RMSNorm in one TPU kernel. Shape letters: T tokens, D width."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float


def add_rms_norm_tpu(
    x: Float[Array, "T D"],
    more: Float[Array, "T_or_more D"] | None,
    weight: Float[Array, "D"],
    eps: float,
    *,
    interpret=None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """As `add_rms_norm`."""
    arrays = (x,) if more is None else (x, more)
    kernel = pl.pallas_call(
        functools.partial(_kernel, eps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * len(arrays),
        interpret=interpret or False,
        name="add_rms_norm",
    )
    normed, *total = kernel(weight, *arrays)
    return (total[0] if total else x), normed


def _kernel(eps: float, weight_ref, *refs):
    *arrays, normed_ref = refs if len(refs) == 2 else (*refs[:2], refs[2])
    x_ref, dtype = refs[0], normed_ref.dtype

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    x = x_ref[...].astype(jnp.float32)
    if len(arrays) == 2:
        more = arrays[1][: x.shape[0]].astype(jnp.float32)
        x = rounded(x + rounded(more))
        refs[3][...] = x.astype(dtype)
    scale = lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
    normed_ref[...] = (rounded(x * scale) * weight_ref[...].astype(jnp.float32)).astype(dtype)
