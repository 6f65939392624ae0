"""A pool of pages that rows share: taken as rows grow, given back when they leave.

On a mesh every device, or group of devices with equal rows and slots, has a pool of its own; the
functions here work on one of them. Page 0 of each is the null page, which stays empty: tables name
it where a row has no page.

Shape letters: B rows, P pages, t tokens a page, n pages of a row at most; new tokens are L lines of
S each, of any rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention import Coords

FREE = -1  # a page's owner
NULL = -2  # the owner of page 0


class Pool(NamedTuple):
    """Which pages there are, which row has each, and the token in each slot of each page.

    Attributes:
        coords: of the tokens in the slots [P, t]; free pages hold padding only.
        owner: the row that has a page, FREE, or NULL.
        table: the pages of each row in order; the first axis is that of the devices that share it.
    """

    coords: Coords
    owner: Int[Array, "P"]
    table: Int[Array, "1 B n"]


def empty_pool(rows: int, columns: int, pages: int, page: int, stores: int, shards: int) -> Pool:
    """A pool whose pages are all free; arguments after `rows` as in `PoolSize`."""
    number = jnp.arange(stores * pages, dtype=jnp.int32) % pages
    coords = Coords(*(jnp.zeros((stores * pages, page), jnp.int32) for _ in range(2)))
    owner = jnp.where(number == 0, NULL, FREE).astype(jnp.int32)
    return Pool(coords, owner, jnp.zeros((shards, rows, columns), jnp.int32))


def take_pages(pool: Pool, slots: Int[Array, "L S"], rows: Int[Array, "L S"]) -> Pool:
    """Gives rows the pages that their new tokens need and that they do not have yet.

    Where too few are free, the last rows go without: `pool_index` then drops their tokens.

    Args:
        slots: the slot of each new token in its row; negative ones, and those beyond the table,
            need no page.
        rows: the row of each new token.
    """
    table, page = pool.table[0], pool.coords.segment.shape[1]
    column = jnp.where(slots < 0, table.shape[1], slots // page)
    needed = jnp.zeros(table.shape, bool).at[rows, column].set(True, mode="drop")
    new = needed & (table == 0)
    rank = jnp.cumsum(new.reshape(-1)).reshape(new.shape) - 1  # of each page to take
    free = pool.owner == FREE
    turn = jnp.cumsum(free) - 1  # of each free page
    count = len(free)
    in_turn = jnp.zeros(count, jnp.int32).at[jnp.where(free, turn, count)].set(
        jnp.arange(count, dtype=jnp.int32), mode="drop"
    )  # fmt: skip
    table = jnp.where(new, in_turn[jnp.minimum(rank, count - 1)], table)
    taken_by = jnp.cumsum(jnp.sum(new, axis=1))  # how many the rows up to each take
    row = jnp.sum(turn[:, None] >= taken_by, axis=1, dtype=jnp.int32)  # a search would be a loop
    owner = jnp.where(free & (turn < taken_by[-1]), row, pool.owner)
    return pool._replace(owner=owner, table=table[None])


def pool_index(pool: Pool, slots: Int[Array, "L S"], rows: Int[Array, "L S"]) -> Int[Array, "L S"]:
    """The index of rows' slots among all slots of the pool; beyond them for one without a page."""
    table, (pages, page) = pool.table[0], pool.coords.segment.shape
    column = slots // page
    here = (slots >= 0) & (column < table.shape[1])
    number = table[rows, jnp.where(here, column, 0)]
    return jnp.where(here & (number != 0), number * page + slots % page, pages * page)


def write_coords(pool: Pool, index: Int[Array, "L S"], new: Coords) -> Pool:
    """The pool with the new tokens' coordinates at `index`."""

    def put(old, x):
        return old.reshape(-1).at[index].set(x, mode="drop").reshape(old.shape)

    return pool._replace(coords=Coords(*map(put, pool.coords, new)))


def give_back(pool: Pool, leaves: Bool[Array, "B"]) -> Pool:
    """The pool with all pages of the rows that leave free: their tokens are no longer visible."""
    freed = (pool.owner >= 0) & leaves[jnp.maximum(pool.owner, 0)]
    position, segment = pool.coords
    return Pool(
        Coords(position, jnp.where(freed[:, None], 0, segment)),
        jnp.where(freed, FREE, pool.owner),
        jnp.where(leaves[:, None], 0, pool.table),
    )


def give_back_empty(pool: Pool) -> Pool:
    """The pool with those pages of rows free that hold no token any more."""
    freed = (pool.owner >= 0) & ~jnp.any(pool.coords.segment != 0, axis=1)
    return pool._replace(
        owner=jnp.where(freed, FREE, pool.owner),
        table=jnp.where(freed[pool.table], 0, pool.table),
    )
