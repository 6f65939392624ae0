"""Where a cache lies on a mesh, and in which units rows take room of it.

Shape letters: P pages, K key/value heads, t tokens a page.
"""

import math

from jax.sharding import PartitionSpec

from jaxmoe import mesh as meshes
from jaxmoe.model.kv_cache.pages import Pool
from pallas_kernels.attention import Coords

PAGE = (
    128  # tokens of a page: as many as a TPU vector has lanes, so that no array of a page is padded
)
# A pool's pages are a multiple of a TPU vector's sublanes: XLA writes to scales [P, K, t] in a flat
# view, which is padded otherwise, so that a step would copy all scales to that layout and back.
PAGE_UNIT = 8


def slot_shards(mesh=None) -> int:
    """How many devices share a row's full cache on `mesh`, by default the current one."""
    mesh = meshes.current_mesh() if mesh is None else mesh
    return 1 if mesh is None else meshes.axis_size(mesh, "slots")


def round_capacity(tokens: int, mesh=None) -> int:
    """The smallest capacity that holds `tokens` tokens a row on `mesh` or the current one."""
    unit = PAGE * slot_shards(mesh)
    return -(-tokens // unit) * unit


def row_groups(rows: int, mesh=None) -> int:
    """How many groups a batch's rows are divided into; each has pages of its own."""
    mesh = meshes.current_mesh() if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in row_axes(mesh, rows))


def pages_for(tokens: int, mesh=None) -> int:
    """Pages of the full cache that a row of `tokens` tokens takes on each device, at most."""
    return -(-tokens // (PAGE * slot_shards(mesh)))


def pool_pages(pages: int) -> int:
    """How many pages a pool has that is to have so many besides the null page."""
    return -(-(1 + pages) // PAGE_UNIT) * PAGE_UNIT


def row_axes(mesh, rows: int) -> tuple[str, ...]:
    """The mesh axes that a batch's rows are divided over."""
    return meshes.activation_axes(mesh, "batch", rows)


def row_spec(mesh, rows: int) -> PartitionSpec:
    """Where an array [rows, ...] lies."""
    return meshes.sharded_spec(mesh, row_axes(mesh, rows))


def pool_spec(mesh, rows: int, sharded: bool) -> Pool:
    """Where the arrays of a pool lie: a Pool of PartitionSpecs.

    Args:
        sharded: whether the devices of the `slots` axis share each row.
    """
    slots = _slot_axes(sharded)
    pages = meshes.sharded_spec(mesh, (*row_axes(mesh, rows), *slots))
    table = meshes.sharded_spec(mesh, slots, row_axes(mesh, rows))
    return Pool(Coords(pages, pages), pages, table)  # pyrefly: ignore  # specs for arrays


def keys_spec(mesh, rows: int, sharded: bool, x) -> PartitionSpec:
    """Where keys or values [P, K, t, ...] or their scales lie; arguments as for `pool_spec`."""
    pages = (*row_axes(mesh, rows), *_slot_axes(sharded))
    return meshes.sharded_spec(mesh, pages, meshes.activation_axes(mesh, "kv_heads", x.shape[1]))


def _slot_axes(sharded: bool) -> tuple[str, ...]:
    return meshes.RULES["slots"] if sharded else ()
