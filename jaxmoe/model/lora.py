"""LoRA (arXiv 2106.09685): beside a frozen matrix, the product of two small ones that are trained.

A `LoraMatrix` stands in the parameters' tree where a matrix stood, which may be quantized (QLoRA,
arXiv 2305.14314). Nothing of the matrix's own size is made: y = x @ base + scale * (x @ a) @ b.

Shape letters: R rows, N blocks of R / N rows, E experts, D inputs, F outputs, r rank.
"""

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.model.quantized import as_rows
from pallas_kernels.arrays import pad_axis
from pallas_kernels.experts import gated_matmul, grouped_implementation, grouped_matmul
from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix, quantize_matrix

KERNEL_RANK = 256  # what the grouped kernels take: a rank below is filled up with zeros


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"]
)
@typing.no_type_check  # JAX rebuilds pytrees with shapes or shardings in place of arrays
@dataclasses.dataclass(frozen=True)
class LoraMatrix:
    """A parameter and the adapter beside it: base + scale * a @ b.

    Attributes:
        base: the parameter, in its own shape, or quantized.
        a: [..., in, r], of the parameter as matrices [..., in, out]. None for the experts' `up`,
            which shares the `a` of their `gate`: in PEFT's files both are one matrix.
        b: [..., r, out].
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (arXiv 2312.03732).
    """

    base: jax.Array | QuantizedMatrix
    a: jax.Array | None
    b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of `a` and `b`, which the product is computed in."""
        return self.b.dtype

    @property
    def rank(self) -> int:
        """How many columns `a` has."""
        return self.b.shape[-2]


Matrices = Float[Array, "E D F"] | QuantizedMatrix | LoraMatrix


def is_lora(x: Any) -> bool:
    """Whether `x` is a LoraMatrix, for `is_leaf` of tree functions."""
    return isinstance(x, LoraMatrix)


def base_of(w: Any) -> Any:
    """The parameter without its adapter."""
    return w.base if isinstance(w, LoraMatrix) else w


def without_adapters(params: dict) -> dict:
    """The parameters that the adapters stand beside."""
    return jax.tree.map(base_of, params, is_leaf=is_lora)


def adding_nothing(params: dict) -> dict:
    """The parameters with adapters whose `b` is zero."""

    def of_one(w: Any) -> Any:
        return dataclasses.replace(w, b=jnp.zeros_like(w.b)) if is_lora(w) else w

    return jax.tree.map(of_one, params, is_leaf=is_lora)


def lora_axes(w: LoraMatrix, base: Any, matrix_axes: tuple[str | None, ...]) -> LoraMatrix:
    """The logical axes of the arrays, from those of `base` and of the matrix [..., in, out]."""
    *outer, inputs, outputs = matrix_axes
    a = None if w.a is None else (*outer, inputs, None)
    return LoraMatrix(base, a, (*outer, None, outputs), w.scale)  # pyrefly: ignore  # axes


def lora_delta(
    subscripts: str, x: Float[Array, "..."], w: LoraMatrix, head_dim: int | None = None
) -> Float[Array, "..."]:
    """What the adapter adds to the einsum of `x` and its base, in float32.

    Args:
        subscripts, head_dim: as for `jaxmoe.model.layers.linear`.
    """
    rows, _, shaped = as_rows(subscripts, x, head_dim)
    low = _dot(rows, w.a).astype(x.dtype)
    return w.scale * shaped(_dot(low, w.b))


def _dot(x: jax.Array, w: Any) -> jax.Array:
    return jnp.einsum(
        "...i,io->...o",
        x,
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def experts_gated(
    x: Float[Array, "R D"],
    gate: Matrices,
    up: Matrices,
    group_of_block: Int[Array, "N"],
    row_scale: Float[Array, "R"] | None = None,
    **kernels: Any,
) -> Float[Array, "R F"]:
    """`gated_matmul`, where `gate` and `up` may have adapters: both or neither."""
    if not isinstance(gate, LoraMatrix):
        assert not isinstance(up, LoraMatrix)
        return gated_matmul(x, gate, up, group_of_block, row_scale, **kernels)
    low = _factor_product(x, gate.a, group_of_block, **kernels)
    g, u = (_with_delta(x, w, low, group_of_block, **kernels) for w in (gate, up))
    scale = 1.0 if row_scale is None else row_scale[:, None].astype(jnp.float32)
    return (jax.nn.silu(scale * g) * (scale * u)).astype(x.dtype)


def experts_matmul(
    x: Float[Array, "R D"], w: Matrices, group_of_block: Int[Array, "N"], **kernels: Any
) -> Float[Array, "R F"]:
    """`grouped_matmul`, where `w` may have an adapter."""
    if not isinstance(w, LoraMatrix):
        return grouped_matmul(x, w, group_of_block, **kernels)
    low = _factor_product(x, w.a, group_of_block, **kernels)
    return _with_delta(x, w, low, group_of_block, **kernels).astype(x.dtype)


def _with_delta(x, w: Any, low, group_of_block, **kernels) -> jax.Array:
    """x @ base + scale * low @ b by blocks, a float32 sum of rounded products."""
    base = grouped_matmul(x, w.base, group_of_block, **kernels).astype(jnp.float32)
    return base + w.scale * _factor_product(low, w.b, group_of_block, **kernels)


def _factor_product(x, w, group_of_block, *, implementation=None, interpret=None) -> jax.Array:
    """x @ w by blocks, where x has r columns or w makes r.

    The kernels for Hopper and TPUs serve widths of whole tiles, so for them zeros fill up the rank:
    a tile is read once for a block, and is small beside the base's. XLA gets the rank as it is.
    """
    named = {"implementation": "xla" if implementation == "xla" else None, "interpret": interpret}
    filled = pad_axis(x, 1, KERNEL_RANK), pad_axis(pad_axis(w, 1, KERNEL_RANK), 2, KERNEL_RANK)
    if grouped_implementation(*filled, group_of_block, **named) == "xla":
        return grouped_matmul(x, w, group_of_block, **named)
    return grouped_matmul(*filled, group_of_block, **named)[:, : w.shape[2]]


def merged_matrix(w: LoraMatrix, a: Float[Array, "*outer D r"]) -> Any:
    """base + scale * a @ b, summed in float32 and rounded once, to what `base` is stored in.

    Args:
        a: the adapter's, which `w` may not hold itself.
    """
    factors = a.astype(jnp.float32), w.b.astype(jnp.float32)
    delta = w.scale * jnp.matmul(*factors, precision=jax.lax.Precision.HIGHEST)
    if isinstance(w.base, QuantizedMatrix):
        merged = dequantize_matrix(w.base) + delta
        return quantize_matrix(merged, w.base.format, w.base.group_size)
    return (w.base + delta.reshape(w.base.shape)).astype(w.base.dtype)
