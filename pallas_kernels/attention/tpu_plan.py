"""Sizes of the TPU decode kernel, and which blocks of pages each core visits.

Shape letters are those of `decode_tpu`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels import tuning
from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.masks import (
    BlockRanges,
    Coords,
    KeyRange,
    block_ranges,
    extents,
    joined_extents,
    visible_blocks,
)
from pallas_kernels.attention.pages import extents_of_rows
from pallas_kernels.tpu import LANES, num_cores

MOST_PAGES = LANES - 2  # of a block: with two more numbers they fill an entry of the list
LONG, MIDDLE, SHORT = 4096, 1024, 512  # keys a block
INT4_BLOCKS = 3  # times as many keys of int4: the bytes of a block outweigh what it costs besides
MANY_ROWS = 8


@dataclasses.dataclass(frozen=True)
class DecodeTpuConfig:
    """Sizes of the decode kernel.

    Attributes:
        block_k: keys and key heads a block.
        slots: blocks in flight; a power of two.
        cores: cores of a device that share the work.
    """

    block_k: int = SHORT
    slots: int = 4
    cores: int = 1

    def pages(self, page: int, kv_heads: int) -> int:
        """N: how many pages of so many keys a block has."""
        return min(MOST_PAGES, max(1, self.block_k // (page * kv_heads)))


def config_for(case) -> DecodeTpuConfig:
    """Blocks that are large for few rows of many keys.

    A block costs some 150 bundles besides its keys. But the last block of a row is computed whole,
    however few of its keys there are. The size tuned for the device is for rows of many blocks.
    """
    few = case.rows < MANY_ROWS
    key = {"cache": case.cache, "head_dim": case.head_dim, "few_rows": few}
    tuned = tuning.lookup("decode", **key) or {}
    size = LONG if few else MIDDLE
    sizes = (INT4_BLOCKS * size, size) if case.cache == "int4" else (size,)
    if "block_k" in tuned:
        sizes = (tuned["block_k"], *sizes)
    size = next((size for size in sizes if case.keys >= 4 * size), SHORT)
    return DecodeTpuConfig(**(tuned | {"block_k": size}), cores=num_cores())


class Visits(NamedTuple):
    """Which blocks each visitor reads, a row or a tile of queries, in numbers in scalar memory.

    They are those from `start` up to `stop`, as in `BlockRanges`. The `following` visitor is the
    next one that reads any.
    """

    start: Int[Array, "visitors"]
    full_start: Int[Array, "visitors"]
    full_stop: Int[Array, "visitors"]
    stop: Int[Array, "visitors"]
    following: Int[Array, "visitors"]


def visits_of(ranges: BlockRanges) -> Visits:
    """What visitors read whose ranges are [visitors]."""
    return Visits(*ranges, _following(ranges.stop > ranges.start))


class Runs(NamedTuple):
    """Where the cores go, in numbers that lie in scalar memory.

    A core takes `count` blocks, from block `block` of row `row` on: the blocks of a row in order,
    then those of the following row that has any.
    """

    visits: Visits  # those of rows
    row: Int[Array, "C"]
    block: Int[Array, "C"]
    count: Int[Array, "C"]
    q_range: KeyRange  # what queries see, [B * S]


class Entries(NamedTuple):
    """The list of all blocks, and what an element at an index of a block's entry says."""

    list: Int[Array, "B blocks 1 lanes"]
    pages: int

    @property
    def filled(self) -> int:
        """The index of how many of the block's first pages may hold tokens."""
        return self.pages

    @property
    def together(self) -> int:
        """The index of whether all of them do, and follow each other in the pool."""
        return self.pages + 1

    @property
    def owner(self) -> int:
        """The index of the segment of the first page's tokens, if the list says it."""
        return self.pages + 2


def plan(
    q_range: KeyRange, k_coords: Coords, table: Int[Array, "B pages"], pages: int, cores: int
) -> tuple[Runs, Entries]:
    """Which blocks of `pages` pages the cores visit, and the list of the blocks' pages."""
    columns = table.shape[1]
    table = pad_axis(table, 1, pages)
    real = jnp.arange(table.shape[1]) < columns
    by_page = extents_of_rows(extents(k_coords, k_coords.segment.shape[1]), table, real)
    some, every = visible_blocks(q_range, joined_extents(by_page, pages), q_range.first.shape[1])
    visits = visits_of(BlockRanges(*(x[:, 0] for x in block_ranges(some, every))))
    shares = _shares(visits.start, visits.stop, cores)
    runs = Runs(visits, *shares, KeyRange(*(x.reshape(-1) for x in q_range)))
    return runs, entries_of(table, by_page.first <= by_page.last, pages)


def _shares(start, stop, cores: int):
    """The row and the block where each core begins, and how many blocks it takes."""
    ends = jnp.cumsum(stop - start)
    share = -(-ends[-1] // cores)
    begin = jnp.minimum(jnp.arange(cores, dtype=jnp.int32) * share, ends[-1])
    row = jnp.sum(ends <= begin[:, None], -1, dtype=jnp.int32)
    row = jnp.minimum(row, len(start) - 1)
    block = start[row] + begin - (ends - (stop - start))[row]
    return row, block, jnp.clip(ends[-1] - begin, 0, share)


def _following(visited):
    """For each row the next one that is visited; the last row if there is none."""
    last = len(visited) - 1
    own = jnp.where(visited, jnp.arange(last + 1, dtype=jnp.int32), last)
    return jnp.append(lax.cummin(own, reverse=True)[1:], jnp.int32(last))


def entries_of(
    table: Int[Array, "B n"],
    holds: Bool[Array, "B n"],
    pages: int,
    owner: Int[Array, "B n"] | None = None,
) -> Entries:
    """The list of the blocks of a table.

    Args:
        table: pages, a multiple of `pages` a row.
        holds: which of them may hold tokens.
        owner: the segment that a page's tokens have; None for their own.
    """
    table, holds = (x.reshape(len(table), -1, pages) for x in (table, holds))
    filled = jnp.max(jnp.where(holds, jnp.arange(1, pages + 1), 0), -1)
    in_turn = jnp.all(table[..., 1:] == table[..., :-1] + 1, -1)
    together = (filled == pages) & in_turn
    owners = [] if owner is None else [owner.reshape(table.shape)]
    numbers = [table, filled[..., None], together[..., None], *owners]
    entries = jnp.concatenate([x.astype(jnp.int32) for x in numbers], -1)
    return Entries(pad_axis(entries, 2, LANES)[:, :, None], pages)
