"""Assigns a row to each item so that items are sorted by group (group metadata).

Items are tokens, or a token once for each of its experts; groups are experts. Every group starts on
a block boundary, so that a block of rows is multiplied by one matrix. No item is dropped.

Shape letters: N items, R rows, E groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.platform import target

LEAST_OF_KERNELS = 8  # the smallest block of kernels: wgmma's columns, and rows of a TPU's tile
FEW_OF_TPUS = 64  # rows that take a TPU's MXU about as long as loading a matrix


class GroupMetadata(NamedTuple):
    """The maps between items and rows.

    Attributes:
        row_of_item: the row of each item; R for an item without a group.
        item_of_row: the item of each row; N for a row without an item.
        group_of_block: the group of each block of rows, ascending; E for an empty block.
        group_sizes: how many items each group has.
    """

    row_of_item: Int[Array, "N"]
    item_of_row: Int[Array, "R"]
    group_of_block: Int[Array, "blocks"]
    group_sizes: Int[Array, "E"]


def block_rows(num_items: int, num_groups: int, largest: int = 128) -> int:
    """A block size in rows: a power of two, at least 8 on Hopper and TPUs, as their kernels need.

    On Hopper it is twice an average group, or all items of one group, up to `largest`: kernels read
    a group's matrix for each of its blocks, which takes longer than multiplying rows that no item
    takes, and routers make groups of unequal sizes. On TPUs that holds up to 64 rows, since kernels
    load a group's matrix into the MXU for each of its blocks; from there on it is an average group,
    rounded down. Elsewhere it is half an average group, so that few rows are multiplied in vain.
    """
    device = target()
    average = max(1, num_items // num_groups)
    if device.is_hopper:
        return rows_of_whole_groups(num_items, num_groups, largest)
    if device.platform == "tpu":
        whole = rows_of_whole_groups(num_items, num_groups, min(largest, FEW_OF_TPUS))
        return max(whole, min(largest, _power_of_two(average)))
    return min(largest, _power_of_two(max(1, average // 2)))


def _power_of_two(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def rows_of_whole_groups(num_items: int, num_groups: int, largest: int = 128) -> int:
    """`block_rows` on Hopper, whatever the current device."""
    rows = num_items if num_groups == 1 else 2 * -(-num_items // num_groups)
    return min(largest, max(LEAST_OF_KERNELS, 1 << (rows - 1).bit_length()))


def make_group_metadata(group: Int[Array, "N"], num_groups: int, block: int) -> GroupMetadata:
    """Assigns rows to items by group, and by item within a group. Deterministic, without a sort.

    A layer computes it once, for all of its products.

    Args:
        group: the group of each item; `num_groups` or more means that the item takes no row.
        num_groups: E.
        block: rows of a block, such as `block_rows` gives.
    """
    N, E = group.shape[0], num_groups
    num_blocks = min(N, N // block + E)  # an upper bound of the sum of ceil(size / block)
    member = jax.nn.one_hot(group, E, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(member, axis=0) - 1) * member, axis=1)
    sizes = jnp.sum(member, axis=0)
    last_block = jnp.cumsum((sizes + block - 1) // block)
    first_row = jnp.append((last_block - (sizes + block - 1) // block) * block, num_blocks * block)
    row = jnp.where(group < E, first_row[jnp.minimum(group, E)] + rank, num_blocks * block)
    item_of_row = jnp.full(num_blocks * block, N).at[row].set(jnp.arange(N), mode="drop")
    block_index = jnp.arange(num_blocks)[:, None]
    # A count rather than `searchsorted`, which XLA compiles to a loop.
    group_of_block = jnp.sum(block_index >= last_block, axis=1)
    return GroupMetadata(row, item_of_row, group_of_block, sizes)
