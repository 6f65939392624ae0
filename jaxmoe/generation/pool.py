"""How large the engine's cache is, how its rows lie on the mesh, and a document as one of them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.generation.document import Document
from jaxmoe.generation.prefixes import Prefix
from jaxmoe.generation.request import Request, check_room
from jaxmoe.generation.rows import FreePages
from jaxmoe.model.kv_cache import (
    PAGE,
    Cache,
    CacheKind,
    Pool,
    cache_kind,
    cache_kinds,
    capacity_of,
    init_cache,
    keys_spec,
    pool_spec,
    round_capacity,
    row_axes,
    row_groups,
    slot_shards,
)
from jaxmoe.model.kv_cache.kind import Room
from jaxmoe.model.kv_cache.pages import FREE
from jaxmoe.model.kv_cache.ring import RingCache
from pallas_kernels.attention import Coords

HOLDERS = 4  # rows of a group that hold prefixes
SMALLEST, POWERS_TO = 2048, 65_536  # tokens of a row; up to where they are a power of 2
ALL_ROWS = 32_768  # tokens: where all rows can be the longest with no more, they can


class Layout(NamedTuple):
    """The rows of a batch: `groups` of `rows` for requests and `holders` of prefixes."""

    groups: int
    rows: int
    holders: int

    @property
    def each(self) -> int:
        """Rows of a group."""
        return self.rows + self.holders

    @property
    def total(self) -> int:
        """Rows of all groups."""
        return self.groups * self.each


def lay_out(rows: int, holders: int) -> Layout:
    """Rows for so many requests at once, in as many groups as the current mesh has room for.

    Args:
        holders: rows of a group that hold prefixes, at least.
    """
    mesh = meshes.current_mesh()
    groups = 1
    sizes = [] if mesh is None else [mesh.shape[axis] for axis in meshes.RULES["batch"]]
    for size in sizes:
        if groups * size > rows:
            break
        groups *= size
    layout = Layout(groups, -(-rows // groups), holders)
    while row_groups(layout.total) != groups:
        layout = layout._replace(holders=layout.holders + 1)
    return layout


def layout_of(config: Llama4Config, rows: int, requests: Sequence[Request]) -> Layout:
    """One layout for calls of all kinds, since steps are compiled for each, without a document.

    But one row for one long request: its cache has a size of its own, and its steps would look at
    the pages of the other rows.
    """
    if len(requests) == 1 and rows * _capacity(config, requests) > ALL_ROWS:
        return lay_out(1, 0)
    return lay_out(rows, HOLDERS)


def _capacity(config: Llama4Config, requests: Sequence[Request]) -> int:
    """Tokens of a row, in one of few sizes."""
    longest = max(request.length for request in requests)
    return round_capacity(min(round_size(longest), config.max_position_embeddings))


def round_size(tokens: int) -> int:
    """A size of cache that holds so many tokens: of few sizes, since steps are compiled for each.

    Large ones are at most a quarter larger than asked for.
    """
    unit = 2 ** max(0, tokens.bit_length() - 3) if tokens > POWERS_TO else 0
    if unit:
        return -(-tokens // unit) * unit
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


def new_cache(
    config: Llama4Config,
    dtype,
    layout: Layout,
    requests: Sequence[Request],
    prefixes: Sequence[Prefix | None],
    tokens: int | None,
) -> Cache:
    """An empty cache.

    Args:
        dtype: of keys and values, or a name of `KV_FORMATS`.
        prefixes: those that the requests share with one another.
        tokens: that all rows together can hold; default: enough for the longest requests in all
            rows.

    Raises:
        UserError: if that is too few for a request.
    """
    capacity = _capacity(config, requests)
    sizes = (layout.rows * capacity,) * 2
    if layout.rows * capacity > ALL_ROWS:
        spans = [kind.span for kind in cache_kinds(config) if isinstance(kind, RingCache)]
        sizes = (round_size(x) for x in _tokens(layout, requests, prefixes, max(spans, default=0)))
    full, rings = (layout.groups * size for size in sizes)
    if tokens is not None:
        most = max(requests, key=lambda request: request.length)
        check_room(most, tokens)
        room = max(most.length, min(capacity, tokens // layout.groups))  # for longer ones to come
        capacity, full, rings = round_capacity(room), tokens, min(rings, round_size(tokens))
    return init_cache(config, layout.total, capacity, dtype, tokens=full, ring_tokens=rings)


def _tokens(
    layout: Layout, requests: Sequence[Request], prefixes: Sequence[Prefix | None], span: int
) -> tuple[int, int]:
    """Tokens that the full cache and the rings of a group of rows need.

    Args:
        span: tokens of a row that a ring keeps, at most.
    """

    def most(sizes, count: int) -> int:
        return sum(sorted(sizes, reverse=True)[:count])

    def kept(sizes) -> list[int]:
        return [min(size, span) for size in sizes]

    shared = [len(prefix.tokens) if prefix else 0 for prefix in prefixes]
    every = {part for prefix in prefixes if prefix for part in prefix.path}
    read = [len(x.tokens) for x in every]
    own = [len(x.tokens) - (len(x.parent.tokens) if x.parent else 0) for x in every]
    page = PAGE * slot_shards()
    begun = page * layout.each if every else 0  # pages that are copied because they are not whole
    lengths = [request.length for request in requests]
    after = [length - start for length, start in zip(lengths, shared, strict=True)]
    return (
        most(after, layout.rows) + most(own, layout.holders) + begun,
        most(kept(lengths), layout.rows) + most(kept(read), layout.holders),
    )


def free_pages(config: Llama4Config, cache: Cache, layout: Layout, after: int) -> list[FreePages]:
    """The pages of each group of rows that are free but for those of `after` tokens."""
    kinds, shards = cache_kinds(config), slot_shards()

    def free(kind: CacheKind, pool: Pool) -> int:
        stores = layout.groups * (shards if kind.sharded else 1)
        return len(pool.owner) // stores - 1 - kind.pages_for(after, shards)

    pages = tuple(free(kind, pool) for kind, pool in zip(kinds, cache.pools, strict=True))
    return [FreePages(kinds, pages, shards) for _ in range(layout.groups)]


def widen(config: Llama4Config, document: Document, layout: Layout) -> Cache:
    """A document's cache, which is used up, with more rows; the last of each group has its text.

    The text's pages stay where they are: each group of rows has those that every device along its
    mesh axes had before. What layers with rings keep is copied, since they need more room.
    """
    cache = document.cache
    kinds = [cache_kind(spec) for spec in config.attention_specs]
    rings = tuple(x for kind, x in zip(kinds, cache.layers, strict=True) if not kind.shares)
    state = cache.pools, cache.length, cache.dealt, rings
    pools, length, dealt, rings = _widen_state(config, layout, capacity_of(cache), *state)
    grown = iter(rings)
    layers = tuple(
        jax.tree.map(functools.partial(_regroup, layout, kind), layer)
        if kind.shares
        else next(grown)
        for kind, layer in zip(kinds, cache.layers, strict=True)
    )
    return Cache(layers, pools, length, dealt)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _widen_state(config: Llama4Config, layout: Layout, capacity: int, *state):
    """All that depends on the rows: pools, lengths, dealt pages, and the layers with rings."""
    mesh, body = meshes.current_mesh(), functools.partial(_with_rows, config, layout.each, capacity)
    if mesh is not None:
        specs = (_specs(config, mesh, rows, state[-1]) for rows in (1, layout.total))
        body = meshes.per_device(body, *specs)
    return body(*state)


def _specs(config: Llama4Config, mesh, rows: int, rings):
    """Where that state lies, for so many rows."""
    kinds = [kind for kind in map(cache_kind, config.attention_specs) if not kind.shares]
    ring_specs = tuple(
        jax.tree.map(functools.partial(keys_spec, mesh, rows, kind.sharded), layer)
        for kind, layer in zip(kinds, rings, strict=True)
    )
    of_rows = meshes.sharded_spec(mesh, row_axes(mesh, rows))
    pools = tuple(pool_spec(mesh, rows, kind.sharded) for kind in cache_kinds(config))
    return pools, of_rows, of_rows, ring_specs


def _with_rows(config: Llama4Config, rows: int, capacity: int, pools, length, dealt, rings):
    """The state of one group of rows, of which the last is the only one there was before."""
    kinds = cache_kinds(config)

    def pages(kind: CacheKind, pool: Pool) -> int:
        if kind.shares:
            return len(pool.owner)
        return max(len(pool.owner), kind.size(Room(rows, 1, 1, capacity, rows * capacity)).pages)

    counts = {kind: pages(kind, pool) for kind, pool in zip(kinds, pools, strict=True)}
    wide = tuple(_more(pool, rows, counts[kind]) for kind, pool in zip(kinds, pools, strict=True))
    kept = [kind for kind in map(cache_kind, config.attention_specs) if not kind.shares]
    rings = tuple(
        jax.tree.map(lambda x, count=counts[kind]: _pad(x, count), layer)
        for kind, layer in zip(kept, rings, strict=True)
    )
    length = jnp.zeros(rows, jnp.int32).at[-1].set(length[0])
    return wide, length, jnp.arange(rows, dtype=jnp.int32).at[-1].set(dealt[0]), rings


def _more(pool: Pool, rows: int, pages: int) -> Pool:
    owner = _pad(jnp.where(pool.owner == 0, rows - 1, pool.owner), pages, FREE)
    table = jnp.zeros((1, rows, pool.table.shape[2]), jnp.int32).at[0, -1].set(pool.table[0, 0])
    return Pool(Coords(*(_pad(x, pages) for x in pool.coords)), owner, table)


def _pad(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    widths = [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, widths, constant_values=value)


def _regroup(layout: Layout, kind: CacheKind, keys: jax.Array) -> jax.Array:
    """An array of pages that each group of rows has; no page moves to another device."""
    if meshes.current_mesh() is None:
        return keys
    mesh = keys.sharding.mesh  # pyrefly: ignore  # laid out by names
    place = NamedSharding(mesh, keys_spec(mesh, layout.total, kind.sharded, keys))
    held = [shard.data for shard in keys.addressable_shards]
    shards = slot_shards() if kind.sharded else 1
    shape = (layout.groups * shards * len(held[0]), *keys.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, place, held)
