"""Grouped matmul in plain JAX: a loop over blocks that skips those without rows.

Shape letters: R rows, b rows a block, N blocks, E groups, D in, F out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix

HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Config:
    """There is nothing to choose."""


def product(x, weights, group_of_block, row_scale, case, *, transposed: bool):
    """x @ w of each block's group, or silu(x @ w0) * (x @ w1) of two, in float32 sums."""
    num_blocks, groups = group_of_block.shape[0], weights[0].shape[0]
    blocks = x.reshape(num_blocks, -1, x.shape[1])
    scales = None if row_scale is None else row_scale.reshape(num_blocks, -1, 1)
    width = weights[0].shape[1 if transposed else 2]
    nothing = jnp.zeros((blocks.shape[1], width), x.dtype)

    def visit(i, out):
        group = group_of_block[i]

        def multiply():
            products = [_dot(blocks[i], w, group, transposed) for w in weights]
            if scales is not None:
                products = [scales[i] * y for y in products]
            y = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
            return y.astype(x.dtype)

        return out.at[i].set(lax.cond(group < groups, multiply, lambda: nothing))

    # Every block is written, so anything will do to start with. Zeros, as a scan has them, would be
    # made for all layers of a model at its start.
    start = jnp.broadcast_to(x[0, 0], (num_blocks, *nothing.shape))
    return lax.fori_loop(0, num_blocks, visit, start).reshape(-1, width)


def _dot(block, w, group, transposed: bool) -> jax.Array:
    """A quantized matrix is widened for its block only."""
    matrix = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, group, keepdims=False), w)
    if isinstance(matrix, QuantizedMatrix):
        matrix = dequantize_matrix(matrix)
    return _einsum("bF,DF->bD" if transposed else "bD,DF->bF", block, matrix)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


def weight_gradient(x, dy, group_of_block, groups: int, case):
    """x^T dy of each group's rows, [E, D, F]: each block's is added to its group's in place."""
    num_blocks = group_of_block.shape[0]
    blocks = (x.reshape(num_blocks, -1, x.shape[1]), dy.reshape(num_blocks, -1, dy.shape[1]))

    def visit(dw, block):
        (x_i, dy_i), group = block
        add = functools.partial(dw.at[group].add, _einsum("bD,bF->DF", x_i, dy_i))
        return lax.cond(group < groups, add, lambda: dw), None

    start = jnp.zeros((groups, x.shape[1], dy.shape[1]), jnp.float32)
    dw, _ = lax.scan(visit, start, (blocks, group_of_block))
    return dw.astype(x.dtype)
