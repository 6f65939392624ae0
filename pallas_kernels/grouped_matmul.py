"""Grouped matmul: rows sorted by group, each group with its own matrix, work proportional to rows.

Every group starts on a block boundary, so that a block of rows meets one matrix. `plan_groups` says
which row each item takes; `dispatch` and `combine` move items there and back; nothing is dropped.

Shape letters: N items, R rows, b rows a block, E groups, D in, F out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

HIGHEST = lax.Precision.HIGHEST


class GroupPlan(NamedTuple):
    """Both maps between items and rows, and the group of each block (E: the block is empty)."""

    row_of_item: Int[Array, "N"]  # R for an item without a group
    item_of_row: Int[Array, "R"]  # N for a row without an item
    group_of_block: Int[Array, "blocks"]
    group_sizes: Int[Array, "E"]


def block_rows(num_items: int, num_groups: int, largest: int = 128) -> int:
    """A block size, a power of two, that wastes little: about half of an average group."""
    half = max(1, num_items // (2 * num_groups))
    return min(largest, 1 << (half.bit_length() - 1))


def plan_groups(group: Int[Array, "N"], num_groups: int, block: int) -> GroupPlan:
    """Places items by group, in item order within a group; deterministic and without a sort.

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
    group_of_block = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    return GroupPlan(row, item_of_row, group_of_block, sizes)


def dispatch(plan: GroupPlan, x: Float[Array, "N D"]) -> Float[Array, "R D"]:
    """Items to their rows; rows without an item are zero."""
    return _move(x, plan.item_of_row, plan.row_of_item)


def combine(plan: GroupPlan, y: Float[Array, "R D"]) -> Float[Array, "N D"]:
    """Rows back to items; items without a row are zero."""
    return _move(y, plan.row_of_item, plan.item_of_row)


@jax.custom_vjp
def _move(x, source, destination):
    """`x[source]`, zero where `source` is out of range. Its transpose is the opposite move."""
    return x.at[source].get(mode="fill", fill_value=0)


_move.defvjp(
    lambda x, source, destination: (_move(x, source, destination), (source, destination)),
    lambda maps, dy: (_move(dy, maps[1], maps[0]), None, None),
)


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "R D"], w: Float[Array, "E D F"], group_of_block: Int[Array, "blocks"]
) -> Float[Array, "R F"]:
    """`x[rows of block i] @ w[group_of_block[i]]`, in float32 sums; empty blocks cost nothing."""
    return _blockwise(x, w, group_of_block, "bD,DF->bF", w.shape[2])


def _blockwise(x, w, group_of_block, subscripts: str, width: int):
    num_blocks = group_of_block.shape[0]
    blocks = x.reshape(num_blocks, -1, x.shape[1])

    def visit(i, out):
        group = group_of_block[i]

        def multiply():
            matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
            return _dot(subscripts, blocks[i], matrix).astype(x.dtype)

        nothing = jnp.zeros((blocks.shape[1], width), x.dtype)
        return out.at[i].set(lax.cond(group < w.shape[0], multiply, lambda: nothing))

    # Every block is written, so anything will do to start with. Zeros, as a scan has them, would be
    # made for all layers of a model at its start.
    start = jnp.broadcast_to(x[0, 0], (num_blocks, blocks.shape[1], width))
    return lax.fori_loop(0, num_blocks, visit, start).reshape(-1, width)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


def _forward(x, w, group_of_block):
    return grouped_matmul(x, w, group_of_block), (x, w, group_of_block)


def _backward(saved, dy):
    x, w, group_of_block = saved
    dx = _blockwise(dy, w, group_of_block, "bF,DF->bD", w.shape[1])
    return dx, _weight_gradient(x, dy, w, group_of_block), None


def _weight_gradient(x, dy, w, group_of_block):
    """Adds each block's outer product to its group's matrix in place."""
    num_blocks = group_of_block.shape[0]
    blocks = (x.reshape(num_blocks, -1, x.shape[1]), dy.reshape(num_blocks, -1, dy.shape[1]))

    def visit(dw, block):
        (x_i, dy_i), group = block
        add = functools.partial(dw.at[group].add, _dot("bD,bF->DF", x_i, dy_i))
        return lax.cond(group < w.shape[0], add, lambda: dw), None

    dw, _ = lax.scan(visit, jnp.zeros(w.shape, jnp.float32), (blocks, group_of_block))
    return dw.astype(w.dtype)


grouped_matmul.defvjp(_forward, _backward)
