"""A row that goes on where another has come to: prompts that begin alike are read once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.kv_cache.cache import (
    Cache,
    cache_kind,
    cache_kinds,
    cache_specs,
    restart_rows,
)
from jaxmoe.model.kv_cache.kind import CacheKind
from jaxmoe.model.kv_cache.layout import row_axes
from jaxmoe.model.kv_cache.pages import Pool, take_pages
from pallas_kernels.attention import Coords


class _Copies(NamedTuple):
    """Pages to copy within each device's pool; to beyond it for none."""

    source: Int[Array, "m"]
    target: Int[Array, "m"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def fork_row(
    config: Llama4Config,
    cache: Cache,
    source: Int[Array, ""],
    target: Int[Array, ""],
    restart: Bool[Array, "B"],
) -> Cache:
    """The cache, which is used up, with an empty row that goes on where another has come to.

    The two share whole pages of the kinds of cache in which tokens stay where they are; other pages
    are copied. So the source has to stay as it is for as long as the target is there.

    Args:
        source: a row, counted over all groups.
        target: an empty row of the same group, for whose copies there are free pages.
        restart: rows that are emptied first.
    """
    cache = restart_rows(cache, restart)
    mesh = meshes.current_mesh()
    if mesh is None:
        return _fork(config, (), cache, source, target)
    axes, specs = row_axes(mesh, len(cache.length)), cache_specs(config, cache, mesh)
    body = functools.partial(_fork, config, axes)
    one = PartitionSpec()
    return meshes.per_device(body, (specs, one, one), specs)(cache, source, target)


def _fork(config: Llama4Config, axes: tuple[str, ...], cache: Cache, source, target) -> Cache:
    """`fork_row` on each device, of whose rows the two are or are not."""
    rows, kinds = len(cache.length), cache_kinds(config)
    group = lax.axis_index(axes) if axes else 0
    here, source, target = source // rows == group, source % rows, target % rows
    pairs = zip(kinds, cache.pools, strict=True)
    forked = {kind: _fork_pool(kind, pool, here, source, target) for kind, pool in pairs}
    layers = tuple(
        jax.tree.map(functools.partial(_copy, forked[cache_kind(spec)][1]), layer)
        for spec, layer in zip(config.attention_specs, cache.layers, strict=True)
    )
    pools = tuple(pool for pool, _ in forked.values())
    at = jnp.where(here, target, rows)
    of_rows = (x.at[at].set(x[source], mode="drop") for x in (cache.length, cache.dealt))
    return Cache(layers, pools, *of_rows)


def _fork_pool(
    kind: CacheKind, pool: Pool, here: Bool[Array, ""], source, target
) -> tuple[Pool, _Copies]:
    """The pool with the pages of the target, and those whose keys are to be copied."""
    pages, (count, page) = pool.table[0, source], pool.coords.segment.shape
    taken = here & (pages != 0)
    whole = jnp.all(pool.coords.segment[pages] != 0, axis=1)
    shared = taken & whole if kind.shares else jnp.zeros_like(taken)
    at = jnp.where(here, target, pool.table.shape[1])
    table = pool.table.at[0, at].set(jnp.where(shared, pages, 0), mode="drop")
    copied = taken & ~shared
    slots = jnp.where(copied, jnp.arange(len(pages)) * page, -1)[None]
    pool = take_pages(pool._replace(table=table), slots, jnp.full_like(slots, target))
    new = pool.table[0, target]
    copies = _Copies(pages, jnp.where(copied & (new != 0), new, count))
    if kind.shares:  # all but the last page are whole
        last = jnp.argmax(copied)[None]
        copies = _Copies(*(x[last] for x in copies))
    return pool._replace(coords=Coords(*(_copy(copies, x) for x in pool.coords))), copies


def _copy(copies: _Copies, x: jax.Array) -> jax.Array:
    return x.at[copies.target].set(x[copies.source], mode="drop")
