"""The key/value cache: kinds of cache that layers keep, all of them in pages that rows share.

`ring` and `full` are the kinds: each says which tokens it keeps, how large its pool is and how new
tokens attend. `pages` takes and gives back pages, `layer` writes and reads one layer's keys and
values, `layout` says where they lie on a mesh, and `cache` holds all of a model's.
"""

from jaxmoe.model.kv_cache.cache import (
    Cache,
    abstract_cache,
    cache_kind,
    cache_kinds,
    cache_specs,
    capacity_of,
    init_cache,
    keeps_ring,
    plan_writes,
    restart_rows,
    step_spec,
    truncate_rows,
)
from jaxmoe.model.kv_cache.fork import fork_row
from jaxmoe.model.kv_cache.kind import CacheKind, CacheStep
from jaxmoe.model.kv_cache.layer import KV_FORMATS, LayerCache
from jaxmoe.model.kv_cache.layout import (
    PAGE,
    keys_spec,
    pages_for,
    pool_spec,
    round_capacity,
    row_axes,
    row_groups,
    slot_shards,
)
from jaxmoe.model.kv_cache.pages import Pool

__all__ = [
    "KV_FORMATS",
    "PAGE",
    "Cache",
    "CacheKind",
    "CacheStep",
    "LayerCache",
    "Pool",
    "abstract_cache",
    "cache_kind",
    "cache_kinds",
    "cache_specs",
    "capacity_of",
    "fork_row",
    "init_cache",
    "keeps_ring",
    "keys_spec",
    "pages_for",
    "plan_writes",
    "pool_spec",
    "restart_rows",
    "round_capacity",
    "row_axes",
    "row_groups",
    "slot_shards",
    "step_spec",
    "truncate_rows",
]
