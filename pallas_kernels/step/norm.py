"""A residual sum and its RMSNorm in one kernel.

Shape letters: T tokens, D width; m, n: a token's vector is cut into 64 rows of n elements.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic import COLUMNS, WARPGROUP, WGMMA, along_rows, hopper_kernel
from pallas_kernels.step.tpu_norm import add_rms_norm_tpu
from pallas_kernels.tpu import why_not_tpu

UNIT = 8 * WARPGROUP  # widths are multiples of it, so that each of 64 rows has a multiple of 8


def why_not_norm(width: int) -> str | None:
    """Says why `add_rms_norm` cannot serve vectors of this width; None if it can."""
    return f"it takes multiples of {UNIT} elements, not {width}" if width % UNIT else None


def add_rms_norm(
    x: Float[Array, "T D"],
    more: Float[Array, "T_or_more D"] | None,
    weight: Float[Array, "D"],
    eps: float,
    *,
    interpret=None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Returns x + more, and its RMSNorm times `weight`.

    Computes in float32, and rounds to x's dtype after the sum, after the norm and at the end.

    Args:
        x: the residual stream.
        more: what to add to it, rounded to x's dtype first; None adds nothing.
        weight: the norm's weight.
        eps: the norm's epsilon.
        interpret: parameters of an interpreter, or None.
    """
    if why_not_tpu(interpret) is None:
        return add_rms_norm_tpu(x, more, weight, eps, interpret=interpret)
    T, D = x.shape
    cut = WARPGROUP, D // WARPGROUP
    outputs = (jax.ShapeDtypeStruct((T, *cut), x.dtype),) * (1 if more is None else 2)
    kernel = hopper_kernel(
        functools.partial(_kernel, eps, more is not None),
        out_type=outputs,
        scratch_types=(plgpu.SMEM((WARPGROUP,), jnp.float32),),
        grid=(T,),
        grid_names=("token",),
        interpret=interpret,
        kernel_name="add_rms_norm",
    )
    arrays = (x,) if more is None else (x, more)
    outs = kernel([array.reshape(-1, *cut) for array in arrays], weight.reshape(cut))
    normed, *total = (out.reshape(T, D) for out in outs)
    return (total[0] if total else x), normed


def _kernel(eps: float, adds: bool, arrays, weight_mn, normed_Tmn, *rest):
    *total_Tmn, sums_m = rest
    token = lax.axis_index("token")
    dtype = normed_Tmn.dtype

    def load(ref) -> jax.Array:
        return plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)

    def rounded(value) -> jax.Array:
        return value.astype(dtype).astype(jnp.float32)

    x = load(arrays[0].at[token])
    if adds:
        x = rounded(x + rounded(load(arrays[1].at[token])))
        total_Tmn[0].at[token][...] = x.astype(dtype)
    square = total_of_rows((x * x).sum(axis=1), sums_m)
    scale = lax.rsqrt(square / (x.shape[0] * x.shape[1]) + eps)
    normed = rounded(x * along_rows(scale, x)) * load(weight_mn)
    normed_Tmn.at[token][...] = normed.astype(dtype)


def total_of_rows(values: jax.Array, staging) -> jax.Array:
    """The sum of a value for each row, [64], broadcast to all rows.

    Rows are distributed over four warps, so values pass through shared memory.
    """
    staging[...] = values
    plgpu.commit_smem()  # also a barrier of the warpgroup
    everywhere = plgpu.load(staging, layout=COLUMNS, optimized=False)
    return lax.broadcast_in_dim(everywhere, (WARPGROUP, WARPGROUP), [1]).sum(axis=1)
