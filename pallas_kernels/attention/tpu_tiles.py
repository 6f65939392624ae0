"""Sizes of the TPU kernel of `paged_attention`, and which blocks of pages each tile visits.

A tile is a block of queries of one row, of all heads that share a key head. Shape letters are those
of `paged_tpu`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import tuning
from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.flash_xla import power_of_two
from pallas_kernels.attention.masks import (
    BlockRanges,
    Coords,
    KeyRange,
    block_ranges,
    extents,
    joined_extents,
    visible_blocks,
)
from pallas_kernels.attention.pages import extents_of_rows, of_owners
from pallas_kernels.attention.tpu_plan import Entries, Visits, entries_of, visits_of
from pallas_kernels.tpu import LANES, SUBLANES, num_cores

MOST_PAGES = (LANES - 2) // 2  # of a block: with an owner each and two numbers they fill an entry
ROWS = 2 * SUBLANES  # of bfloat16 numbers, which are a whole tile of memory
MOST_ROWS = 8192  # queries times heads of a tile, for which there is room
MANY_ROWS = 4096  # and for which the kernel is no faster
LONG, SHORT = 2048, 512  # keys a block, of long rows and of short ones
BLOCKS = 16  # of a row, at least, while blocks are not short


@dataclasses.dataclass(frozen=True)
class PagedTpuConfig:
    """Sizes of the kernel.

    Attributes:
        block_q: queries a tile, of each head.
        block_k: keys a block.
        slots: blocks in flight; a power of two.
        cores: cores of a device that share the tiles.
    """

    block_q: int = 256
    block_k: int = LONG
    slots: int = 4
    cores: int = 1

    def queries(self, queries: int) -> int:
        """q: how many queries a tile has; fewer than `block_q` where there are fewer."""
        return min(self.block_q, -(-queries // ROWS) * ROWS)

    def heads(self, queries: int, group: int) -> int:
        """How many of a group's heads are multiplied at once: several where queries are few."""
        most = max(1, self.block_q // self.queries(queries))
        return max(heads for heads in range(1, most + 1) if group % heads == 0)

    def pages(self, page: int) -> int:
        """N: how many pages of so many keys a block has; its keys are a multiple of LANES."""
        least = LANES // math.gcd(page, LANES)
        most = max(1, MOST_PAGES // least)
        return least * min(most, max(1, self.block_k // (page * least)))


def config_for(case) -> PagedTpuConfig:
    """A config by the number of heads and keys, or tuned, for all cores of the device."""
    tuned = tuning.lookup("paged", cache=case.cache, head_dim=case.head_dim) or {}
    default = PagedTpuConfig(**tuned)
    many = default.block_q * (case.heads // case.kv_heads) > MANY_ROWS
    return PagedTpuConfig(
        default.block_q // 2 if many else default.block_q,
        max(SHORT, power_of_two(case.keys // BLOCKS, most=default.block_k)),
        cores=num_cores(),
    )


class Tiles(NamedTuple):
    """The tiles that cores compute, those of the first core first, in numbers in scalar memory.

    Attributes:
        visits: which blocks of pages each tile visits.
        row, head, queries: its row, key head and block of queries.
        number: how many blocks of pages its core visits before.
        count: how many blocks each core visits.
    """

    visits: Visits
    row: Int[Array, "tiles"]
    head: Int[Array, "tiles"]
    queries: Int[Array, "tiles"]
    number: Int[Array, "tiles"]
    count: Int[Array, "cores"]


def plan(
    q_range: KeyRange,
    k_coords: Coords,
    pages: Int[Array, "B n"],
    owner: Int[Array, "B n"] | None,
    heads: int,
    sizes: tuple[int, int, int],
) -> tuple[Tiles, Entries]:
    """The tiles of all cores, and the list of all blocks' pages.

    Args:
        q_range: of queries, a multiple of those of a tile.
        pages, owner: as for `paged_tpu`.
        heads: K.
        sizes: queries a tile, pages a block, and cores.
    """
    block_q, many, cores = sizes
    columns = pages.shape[1]
    pages = pad_axis(pages, 1, many)
    real = jnp.arange(pages.shape[1]) < columns
    by_page = extents_of_rows(extents(k_coords, k_coords.segment.shape[1]), pages, real)
    if owner is not None:
        owner = pad_axis(owner, 1, many)
        by_page = of_owners(by_page, owner)
    seen = visible_blocks(q_range, joined_extents(by_page, many), block_q)
    tiles = _dealt(block_ranges(*seen), heads, cores)
    return tiles, entries_of(pages, by_page.first <= by_page.last, many, owner)


def _dealt(ranges: BlockRanges, heads: int, cores: int) -> Tiles:
    """The tiles of ranges [B, blocks of queries], dealt out to the cores in turn.

    A core that would have one less computes its last one again.
    """
    rows, blocks = ranges.start.shape
    number = rows * heads * blocks
    dealt = np.arange(-(-number // cores) * cores)
    dealt = np.where(dealt < number, dealt, dealt - cores).reshape(-1, cores).T
    row, head, queries = (
        jnp.asarray(x.reshape(-1), jnp.int32)
        for x in np.unravel_index(dealt, (rows, heads, blocks))
    )
    visits = visits_of(BlockRanges(*(x[row, queries] for x in ranges)))
    many = (visits.stop - visits.start).reshape(cores, -1)
    before = jnp.cumsum(many, 1, dtype=jnp.int32) - many
    return Tiles(visits, row, head, queries, before.reshape(-1), jnp.sum(many, 1, dtype=jnp.int32))
