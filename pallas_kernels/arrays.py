"""Small helpers for arrays."""

import jax
import jax.numpy as jnp


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Appends zeros along an axis until its size is a multiple of `multiple`."""
    extra = -x.shape[axis] % multiple
    pads = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if extra else x
