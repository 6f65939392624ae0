"""LoRA (arXiv 2106.09685): beside a frozen matrix, the product of two small ones that are trained.

A `LoraMatrix` stands in the parameters' tree where a matrix stood, which may be quantized (QLoRA,
arXiv 2305.14314). Nothing of the matrix's own size is made: y = x @ base + scale * (x @ a) @ b.

A `LoraSet` has several adapters beside the matrix, of which each row of x takes one or none. Their
a lie side by side, and their b below each other. x @ a is made for all of them, and what is not of
a row's own is 0 before the product with b: two dense products for any mix of adapters on any mesh.
With n adapters of rank r they multiply n * r * (D + F) numbers a row, beside D * F of the base, and
read as many a step.

Shape letters: R rows, N blocks of R / N rows, E experts, D inputs, F outputs, r rank.
"""

import dataclasses
import functools
import typing
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "index"],
    meta_fields=["names", "ranks", "scales"],
)
@typing.no_type_check  # as above
@dataclasses.dataclass(frozen=True)
class LoraSet:
    """A parameter and several adapters beside it, of which each row of its inputs takes one.

    Attributes:
        base: as of a `LoraMatrix`.
        a: [..., in, r], where r is the sum of `ranks`; None as in a `LoraMatrix`.
        b: [..., r, out].
        names: the names of the model's adapters.
        ranks: of each in this matrix; 0 for one that does not adapt it.
        scales: of each.
        index: each row's adapter, counted from 1; 0 for none. None where no row has one.
    """

    base: jax.Array | QuantizedMatrix
    a: jax.Array | None
    b: jax.Array
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    index: jax.Array | None = None

    shape, dtype, rank = LoraMatrix.shape, LoraMatrix.dtype, LoraMatrix.rank


Lora = LoraMatrix | LoraSet
Matrices = Float[Array, "E D F"] | QuantizedMatrix | Lora


def is_lora(x: Any) -> bool:
    """Whether `x` is a parameter with adapters, for `is_leaf` of tree functions."""
    return isinstance(x, Lora)


def base_of(w: Any) -> Any:
    """The parameter without its adapters."""
    return w.base if isinstance(w, Lora) else w


def with_index(params: Any, index: Int[Array, "..."] | None) -> Any:
    """A tree of parameters where the rows of their inputs take these adapters, see `LoraSet`."""

    def of_one(w: Any) -> Any:
        return dataclasses.replace(w, index=index) if isinstance(w, LoraSet) else w

    return jax.tree.map(of_one, params, is_leaf=is_lora)


def index_of(params: Any) -> Int[Array, "..."] | None:
    """The index that `with_index` set in a tree of parameters; None if it has none."""
    sets = (w for w in jax.tree.leaves(params, is_leaf=is_lora) if isinstance(w, LoraSet))
    return next((w.index for w in sets), None)


def has_delta(w: Any) -> TypeGuard[Lora]:
    """Whether an adapter adds to a parameter, known while tracing."""
    return isinstance(w, LoraMatrix) or (isinstance(w, LoraSet) and w.index is not None)


def without_adapters(params: dict) -> dict:
    """The parameters that the adapters stand beside."""
    return jax.tree.map(base_of, params, is_leaf=is_lora)


def adding_nothing(params: dict) -> dict:
    """The parameters with adapters whose `b` is zero."""

    def of_one(w: Any) -> Any:
        return dataclasses.replace(w, b=jnp.zeros_like(w.b)) if is_lora(w) else w

    return jax.tree.map(of_one, params, is_leaf=is_lora)


def lora_axes(w: Lora, base: Any, matrix_axes: tuple[str | None, ...]) -> Lora:
    """The logical axes of the arrays, from those of `base` and of the matrix [..., in, out].

    Of the index, which is small, each device has all.
    """
    *outer, inputs, outputs = matrix_axes
    a = None if w.a is None else (*outer, inputs, None)
    axes: dict[str, Any] = {"base": base, "a": a, "b": (*outer, None, outputs)}
    if isinstance(w, LoraSet) and w.index is not None:
        axes["index"] = (None,) * w.index.ndim
    return dataclasses.replace(w, **axes)


def lora_delta(
    subscripts: str, x: Float[Array, "..."], w: Lora, head_dim: int | None = None
) -> Float[Array, "..."]:
    """What the adapters add to the einsum of `x` and its base, in float32.

    Args:
        subscripts, head_dim: as for `jaxmoe.model.layers.linear`.
    """
    rows, _, shaped = as_rows(subscripts, x, head_dim)
    low, scale = _own(w, _dot(rows, w.a).astype(x.dtype))
    return shaped(scale * _dot(low, w.b))


def _own(w: Lora, low: Float[Array, "*rows r"]) -> tuple[jax.Array, Any]:
    """x @ a with 0 for the adapters that are not a row's own, and its own scale."""
    if isinstance(w, LoraMatrix):
        return low, w.scale
    assert w.index is not None
    adapter_of_column = np.repeat(np.arange(1, len(w.ranks) + 1), w.ranks)
    own = w.index[..., None] == adapter_of_column
    scales = jnp.array((0.0, *w.scales), jnp.float32)
    return jnp.where(own, low, 0), scales[w.index][..., None]


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
    assert is_lora(gate) == is_lora(up)
    if not has_delta(gate):
        return gated_matmul(x, base_of(gate), base_of(up), group_of_block, row_scale, **kernels)
    low = _factor_product(x, gate.a, group_of_block, **kernels)
    g, u = (_with_delta(x, w, low, group_of_block, **kernels) for w in (gate, up))
    scale = 1.0 if row_scale is None else row_scale[:, None].astype(jnp.float32)
    return (jax.nn.silu(scale * g) * (scale * u)).astype(x.dtype)


def experts_matmul(
    x: Float[Array, "R D"], w: Matrices, group_of_block: Int[Array, "N"], **kernels: Any
) -> Float[Array, "R F"]:
    """`grouped_matmul`, where `w` may have adapters."""
    if not has_delta(w):
        return grouped_matmul(x, base_of(w), group_of_block, **kernels)
    low = _factor_product(x, w.a, group_of_block, **kernels)
    return _with_delta(x, w, low, group_of_block, **kernels).astype(x.dtype)


def _with_delta(x, w: Any, low, group_of_block, **kernels) -> jax.Array:
    """x @ base + scale * low @ b by blocks, a float32 sum of rounded products."""
    base = grouped_matmul(x, w.base, group_of_block, **kernels).astype(jnp.float32)
    low, scale = _own(w, low)
    return base + scale * _factor_product(low, w.b, group_of_block, **kernels)


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
