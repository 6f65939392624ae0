"""New tokens of a row that several devices share: each has a part of them, along `length`.

Shape letters: B rows, H query heads, K key/value heads, S new tokens, d head size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmoe import mesh as meshes
from jaxmoe.model.packing import PackedRows
from pallas_kernels.attention import Coords, Mask, lse_weight


class NewTokens(NamedTuple):
    """The tokens of a call.

    Attributes:
        own: coordinates of a device's part of them.
        all: coordinates of all tokens of the same rows.
        needs_gather: whether some device needs keys of another's tokens; None: not computed, and
            keys are gathered.
        own_rows: of a packed step, the rows of a device's part of the tokens.
        all_rows: of a packed step, the rows of all tokens.
    """

    own: Coords
    all: Coords
    needs_gather: Bool[Array, ""] | None
    own_rows: PackedRows | None = None
    all_rows: PackedRows | None = None


def needs_gather(mask: Mask, coords: Coords, *, cached: bool) -> Bool[Array, ""] | None:
    """Whether two devices hold new tokens of one chunk, or a cache has to keep a begun chunk.

    Args:
        coords: of all tokens, on every device.
        cached: whether there is a cache, which later tokens read.

    Returns:
        None (not computed) unless the mask is of chunks and each device has room for whole ones.
    """
    mesh, span = meshes.current_mesh(), mask.span
    if mesh is None or span is None or not mask.block_diagonal:
        return None
    length = coords.segment.shape[1]
    axes = meshes.activation_axes(mesh, "length", length)
    held = length // math.prod(mesh.shape[axis] for axis in axes)
    if not axes or held % span:
        return None
    order, real = jnp.arange(length), coords.segment != 0
    last = lax.cummax(jnp.where(real, order, -1), axis=1)  # the last real token up to each
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def changes(x):
        return jnp.take_along_axis(x, jnp.maximum(before, 0), axis=1) != x

    begins = changes(coords.segment) | changes(mask.first(coords.position)) | (before < 0)
    crosses = jnp.any(real & ~begins & (before // held != order // held))
    if not cached:
        return crosses
    following = jnp.take_along_axis(coords.position, last[:, -1:], axis=1) + 1
    return crosses | jnp.any((last[:, -1:] >= 0) & (mask.first(following) != following))


def gather(x, axes: tuple[str, ...], needed: Bool[Array, ""] | None = None):
    """Joins the parts of new tokens that the devices of mesh axes hold.

    Args:
        x: a tree of arrays [B, heads, S of a device, d].
        axes: the mesh axes; () if every device has all tokens.
        needed: where it is false, other devices' parts are zeros, and nothing is sent.
    """

    def gathered(x):
        return lax.all_gather(x, axes, axis=2, tiled=True)

    def own_part(x):
        rows, heads, own, size = x.shape
        whole = jnp.zeros((rows, heads, own * lax.axis_size(axes), size), x.dtype)
        return lax.dynamic_update_slice_in_dim(whole, x, own * lax.axis_index(axes), 2)

    if not axes:
        return x
    if needed is None:
        return jax.tree.map(gathered, x)
    return lax.cond(needed, *(functools.partial(jax.tree.map, f) for f in (gathered, own_part)), x)


def merge_over_devices(
    out: Float[Array, "B H S d"], lse: Float[Array, "B H S"], token_axes: tuple[str, ...] = ()
) -> Float[Array, "B H own d"]:
    """Joins attention over the devices that hold a part of each row's cache.

    Args:
        out: attention to each device's part of the keys; float32, or rounded twice.
        lse: the log-sum-exp of the scores of that part.
        token_axes: the mesh axes that new tokens are sharded over; each device keeps its own.
    """
    slot_axes = meshes.sharded_axes("slots")
    if not slot_axes:
        return out
    weight = lse_weight(lse, lax.pmax(lse, slot_axes))[..., None]
    parts = (out.astype(jnp.float32) * weight, weight)
    if token_axes:
        add = functools.partial(lax.psum_scatter, scatter_dimension=2, tiled=True)
        total, norm = (add(x, slot_axes) for x in parts)
    else:
        total, norm = (lax.psum(x, slot_axes) for x in parts)
    return (total / jnp.where(norm == 0, 1, norm)).astype(out.dtype)
