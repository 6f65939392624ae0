"""Which row each item takes when items are sorted by group.

Every group starts on a block boundary, so that a block of rows meets one matrix. Nothing is
dropped.

Shape letters: N items, R rows, E groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.platform import target

LEAST_OF_KERNELS = 8  # columns of the smallest wgmma, rows of a TPU's smallest tile


class GroupPlan(NamedTuple):
    """Both maps between items and rows, and the group of each block (E: the block is empty)."""

    row_of_item: Int[Array, "N"]  # R for an item without a group
    item_of_row: Int[Array, "R"]  # N for a row without an item
    group_of_block: Int[Array, "blocks"]
    group_sizes: Int[Array, "E"]


def block_rows(num_items: int, num_groups: int, largest: int = 128) -> int:
    """A block size, a power of two, that wastes little: about half of an average group."""
    device = target()
    least = LEAST_OF_KERNELS if device.is_hopper or device.platform == "tpu" else 1
    half = max(1, num_items // (2 * num_groups))
    return min(largest, max(least, 1 << (half.bit_length() - 1)))


def plan_groups(group: Int[Array, "N"], num_groups: int, block: int) -> GroupPlan:
    """Places items by group, in item order within a group; deterministic and without a sort.

    Computed once a layer, for all its products.

    Args:
        group: the group of each item; `num_groups` or more means that the item takes no row.
    """
    N, E = group.shape[0], num_groups
    num_blocks = min(N, N // block + E)  # the sum of ceil(size / block) is never larger
    member = jax.nn.one_hot(group, E, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(member, axis=0) - 1) * member, axis=1)
    sizes = jnp.sum(member, axis=0)
    last_block = jnp.cumsum((sizes + block - 1) // block)
    first_row = jnp.append((last_block - (sizes + block - 1) // block) * block, num_blocks * block)
    row = jnp.where(group < E, first_row[jnp.minimum(group, E)] + rank, num_blocks * block)
    item_of_row = jnp.full(num_blocks * block, N).at[row].set(jnp.arange(N), mode="drop")
    block_index = jnp.arange(num_blocks)[:, None]
    group_of_block = jnp.sum(block_index >= last_block, axis=1)  # a search would be a loop
    return GroupPlan(row, item_of_row, group_of_block, sizes)
