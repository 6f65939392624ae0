"""A linear layer whose matrix has 8 or 4 bits, which on Hopper and TPUs is never widened in memory.

Letters of subscripts: B rows, S tokens, D embed, H query heads, K key/value heads, d head size,
F feed-forward width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe import mesh as meshes
from pallas_kernels.arrays import pad_axis
from pallas_kernels.experts import grouped_implementation, grouped_matmul, rows_of_blocks
from pallas_kernels.quantized import QuantizedMatrix

# The logical axis of a dimension when it is used.
AXES = {
    "B": "batch",
    "S": "length",
    "D": None,
    "H": "heads",
    "K": "kv_heads",
    "F": "ffn",
    "d": None,
}


def matrix_axes(w: QuantizedMatrix, *axes: str | None) -> QuantizedMatrix:
    """The logical axes of a quantized matrix's arrays, from those of the matrix [..., in, out].

    A scale that all inputs share is on every device. Inputs of int4 are packed in groups that share
    a scale, and a group is never divided.
    """
    *outer, inputs, outputs = axes
    whole = w.scale.shape[-2] == 1 and w.format != "int4"
    qvalue, scale = (*outer, outputs, inputs), (*outer, None if whole else inputs, outputs)
    return QuantizedMatrix(qvalue, scale, w.format)  # pyrefly: ignore  # axes for arrays


def quantized_linear(
    subscripts: str, x: Float[Array, "..."], w: QuantizedMatrix, head_dim: int | None = None
) -> Float[Array, "..."]:
    """The einsum of `x` and what `w` stands for, on any mesh.

    Args:
        subscripts: such as "BSD,DHd->BSHd": what is summed, then what is not, as `w` has them.
        head_dim: d, where `w` makes heads, which it holds as one dimension.
    """
    rows, axes, shaped = as_rows(subscripts, x, head_dim)
    return shaped(_sharded_product(axes, rows, w))


def as_rows(
    subscripts: str, x: Float[Array, "..."], head_dim: int | None = None
) -> tuple[Float[Array, "*lead inputs"], tuple[str | None, ...], Callable[[jax.Array], jax.Array]]:
    """An einsum of `x` and a weight as a product of rows and a matrix [in, out].

    Args:
        subscripts, head_dim: as for `quantized_linear`.

    Returns:
        The rows [..., in]; the logical axes of their dimensions, then of the outputs; and a
        function that gives the product [..., out] the einsum's shape.
    """
    x_letters, w_letters, out_letters = subscripts.replace("->", ",").split(",")
    summed = "".join(letter for letter in w_letters if letter not in out_letters)
    kept = w_letters.removeprefix(summed)
    lead = out_letters.removesuffix(kept)
    x = jnp.einsum(f"{x_letters}->{lead}{summed}", x)
    outer = x.shape[: len(lead)]
    axes = tuple(AXES.get(letter) for letter in (*lead, summed[0], kept[0]))

    def shaped(out: jax.Array) -> jax.Array:
        return out.reshape(*outer, -1, head_dim) if kept.endswith("d") else out

    return x.reshape(*outer, -1), axes, shaped


def _sharded_product(axes: tuple[str | None, ...], x: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """x [..., in] @ w, each device its part.

    Args:
        axes: the logical axes of x, then of the outputs.
    """
    mesh = meshes.current_mesh()
    if mesh is None:
        return _multiply(x, w)
    *lead, inputs, outputs = axes
    spec = functools.partial(meshes.activation_spec, mesh)
    w_axes = matrix_axes(w, inputs, outputs)
    w_spec = jax.tree.map(lambda _, axes: meshes.param_spec_at_use(axes), w, w_axes)
    summed = meshes.RULES[inputs] if inputs else ()

    def body(x, w):
        out = _multiply(x, w)
        return lax.psum(out, summed) if summed else out

    out_shape = (*x.shape[:-1], w.shape[-1])
    in_specs = (spec((*lead, inputs), x.shape), w_spec)
    return meshes.per_device(body, in_specs, spec((*lead, outputs), out_shape))(x, w)


def _multiply(x: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """x [..., in] @ w on one device, as a grouped matmul of one group.

    XLA gets all rows as one block, so that it widens the matrix once.
    """
    rows = x.reshape(-1, x.shape[-1])
    groups = jax.tree.map(lambda array: array[None], w)
    block = rows_of_blocks(len(rows), 1, groups)
    padded = pad_axis(rows, 0, block)
    blocks = jnp.zeros(len(padded) // block, jnp.int32)
    if grouped_implementation(padded, groups, blocks) == "xla":
        padded, blocks = rows, jnp.zeros(1, jnp.int32)
    out = grouped_matmul(padded, groups, blocks)
    return out[: len(rows)].reshape(*x.shape[:-1], -1)
