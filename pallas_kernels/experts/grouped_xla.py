"""Grouped matmul in plain JAX: a loop over blocks that skips those without rows.

Where matrices are small all blocks are multiplied at once: a loop takes longer than the products.

Shape letters: R rows, b rows of a block, N blocks, E groups, D inputs, F outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix

HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class GroupedXlaConfig:
    """Results do not depend on it beyond rounding.

    Attributes:
        at_once: bytes of the matrices of all blocks up to which there is no loop.
    """

    at_once: int = 2**22  # which caches of CPUs hold


def product(x, weights, group_of_block, row_scale, case, *, transposed: bool):
    """Multiplies each block by its group's matrix, with float32 sums; returns [R, F].

    With two weights it returns silu(x @ w0) * (x @ w1). Blocks without a group are zero.

    Args:
        x: rows, [R, D].
        weights: one or two, each [E, D, F], arrays or quantized; [E, F, D] if transposed.
        group_of_block: [N], E for a block without rows.
        row_scale: [R], multiplies the products of each row in float32; or None.
        case: the `GroupedCase`.
        transposed: whether to multiply by the transposed matrices.
    """
    num_blocks, groups = group_of_block.shape[0], weights[0].shape[0]
    blocks = x.reshape(num_blocks, -1, x.shape[1])
    scales = None if row_scale is None else row_scale.reshape(num_blocks, -1, 1)
    width = weights[0].shape[1 if transposed else 2]
    empty = jnp.zeros((blocks.shape[1], width), x.dtype)

    def one(block, group, scale):
        def multiply():
            products = [_dot(block, w, group, transposed) for w in weights]
            if scale is not None:
                products = [scale * y for y in products]
            y = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
            return y.astype(x.dtype)

        return lax.cond(group < groups, multiply, lambda: empty)

    given = blocks, group_of_block, scales
    if num_blocks * _bytes_of_group(weights) <= _config(case).at_once:
        return jax.vmap(one)(*given).reshape(-1, width)

    def visit(i, out):
        return out.at[i].set(one(*jax.tree.map(lambda x: x[i], given)))

    # The loop writes every block, so its initial value is arbitrary. A constant such as zeros is
    # avoided because XLA would allocate it for all layers of a model at the start of the program.
    start = jnp.broadcast_to(x[0, 0], (num_blocks, *empty.shape))
    return lax.fori_loop(0, num_blocks, visit, start).reshape(-1, width)


def _config(case) -> GroupedXlaConfig:
    """The case's; the default where another implementation leaves its product to this one."""
    config = case.config
    return config if isinstance(config, GroupedXlaConfig) else GroupedXlaConfig()


def _bytes_of_group(weights) -> int:
    return sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(weights))


def _dot(block, w, group, transposed: bool) -> jax.Array:
    """block @ w[group] in float32; of quantized matrices only this group's is dequantized."""
    matrix = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, group, keepdims=False), w)
    if isinstance(matrix, QuantizedMatrix):
        matrix = dequantize_matrix(matrix)
    return _einsum("bF,DF->bD" if transposed else "bD,DF->bF", block, matrix)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


def weight_gradient(x, dy, group_of_block, groups: int, case):
    """The gradient of the matrices, [E, D, F]: the sum of x^T dy over each group's rows.

    Args:
        x: rows, [R, D].
        dy: the product's cotangent, [R, F].
        group_of_block: [N], E for a block without rows.
        groups: E.
        case: the `GroupedCase`.
    """
    num_blocks = group_of_block.shape[0]
    blocks = (x.reshape(num_blocks, -1, x.shape[1]), dy.reshape(num_blocks, -1, dy.shape[1]))
    start = jnp.zeros((groups, x.shape[1], dy.shape[1]), jnp.float32)
    if num_blocks * start[0].nbytes <= _config(case).at_once:
        products = _einsum("nbD,nbF->nDF", *blocks)
        return start.at[group_of_block].add(products, mode="drop").astype(x.dtype)

    def visit(dw, block):
        (x_i, dy_i), group = block
        add = functools.partial(dw.at[group].add, _einsum("bD,bF->DF", x_i, dy_i))
        return lax.cond(group < groups, add, lambda: dw), None

    dw, _ = lax.scan(visit, start, (blocks, group_of_block))
    return dw.astype(x.dtype)
