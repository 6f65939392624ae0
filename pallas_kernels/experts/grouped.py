"""`grouped_matmul` and `gated_matmul`: multiply blocks of rows, each by the matrix of its group.

Shape letters: R rows, N blocks of R / N rows, E groups, D inputs, F outputs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import Implementation, choose, resolve_config
from pallas_kernels.experts import grouped_megablox, grouped_mosaic, grouped_tpu, grouped_xla
from pallas_kernels.experts.checks import check_groups
from pallas_kernels.experts.group_metadata import block_rows
from pallas_kernels.experts.mosaic_kernels import BLOCK
from pallas_kernels.platform import target
from pallas_kernels.quantized import QuantizedMatrix

Matrices = Float[Array, "E D F"] | QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """What is known of a call at trace time.

    Attributes:
        block: rows of a block.
        groups: E, the number of matrices.
        width_in: D.
        width_out: F.
        dtype: of the rows, and of the matrices unless they are quantized.
        format: of quantized matrices, otherwise None.
        group_size: how many inputs of quantized matrices share a scale, otherwise None.
        interpret: how to run a kernel without its hardware.
        config: the implementation's sizes.
    """

    block: int
    groups: int
    width_in: int
    width_out: int
    dtype: str
    format: str | None = None
    group_size: int | None = None
    interpret: Any = None
    config: Any = None


# Fastest first. Each `run` is a module with `product` and `weight_gradient`.
IMPLEMENTATIONS = (
    Implementation(
        "mosaic_gpu",
        grouped_mosaic.why_not,
        grouped_mosaic,
        grouped_mosaic.GroupedMosaicConfig,
        lambda case: grouped_mosaic.GroupedMosaicConfig(),
    ),
    Implementation(
        "mosaic_tpu",
        grouped_tpu.why_not,
        grouped_tpu,
        grouped_tpu.GroupedTpuConfig,
        grouped_tpu.config_for,
    ),
    Implementation(
        "megablox",
        grouped_megablox.why_not,
        grouped_megablox,
        grouped_megablox.GroupedMegabloxConfig,
        grouped_megablox.config_for,
    ),
    Implementation(
        "xla",
        lambda case: None,
        grouped_xla,
        grouped_xla.GroupedXlaConfig,
        lambda case: grouped_xla.GroupedXlaConfig(),
    ),
)


@dataclasses.dataclass(frozen=True)
class _GroupedCall:
    """The arguments of a call that are static under jit."""

    implementation: Implementation
    case: GroupedCase


def grouped_matmul(
    x: Float[Array, "R D"],
    w: Matrices,
    group_of_block: Int[Array, "N"],
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "R F"]:
    """Multiplies each block of rows by its group's matrix: x[block i] @ w[group_of_block[i]].

    Sums are float32, and the result has x's dtype. Differentiable in reverse mode; quantized
    matrices are constants, through which gradients reach x but not w.

    Args:
        x: rows, grouped into blocks by `dispatch`.
        w: a matrix for each group, of x's dtype or quantized.
        group_of_block: ascending; E for a block without rows, which costs nothing and whose result
            is undefined. Values are trusted, unless JAXMOE_DEBUG_CHECKS=1.
        implementation: "mosaic_gpu", "mosaic_tpu", "megablox" or "xla"; None for the fastest that
            serves the call, which `grouped_implementation` names.
        config: sizes, of that implementation's config type.
        interpret: runs a kernel without its hardware: `plgpu.InterpretGPUParams()` for
            "mosaic_gpu", `pltpu.InterpretParams()` for "mosaic_tpu", True for "megablox".

    Raises:
        ValueError: if the arguments do not fit together, or the named implementation does not
            serve them; says which value and what is allowed.
    """
    call = _call(x, w, group_of_block, implementation, config, interpret)
    return _matmul(call, x, w, group_of_block)


def gated_matmul(
    x: Float[Array, "R D"],
    gate: Matrices,
    up: Matrices,
    group_of_block: Int[Array, "N"],
    row_scale: Float[Array, "R"] | None = None,
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "R F"]:
    """The gated half of SwiGLU by blocks: silu(s * x @ gate) * (s * x @ up).

    It reads x once for both products. Arguments and errors not named here are as of
    `grouped_matmul`.

    Args:
        x: rows, grouped into blocks by `dispatch`.
        gate: a matrix for each group.
        up: matrices of the same shape and dtype as `gate`.
        group_of_block: as of `grouped_matmul`.
        row_scale: s, such as Llama 4's router weight, which multiplies the experts' input. It is
            applied to the products, in float32, since scaling rows commutes with a matmul.
        implementation: as of `grouped_matmul`.
        config: as of `grouped_matmul`.
        interpret: as of `grouped_matmul`.
    """
    if _described(gate) != _described(up):
        raise ValueError(f"gate {_described(gate)} and up {_described(up)} must be alike.")
    if row_scale is not None and row_scale.shape != x.shape[:1]:
        raise ValueError(f"row_scale has shape {row_scale.shape}; it must be {x.shape[:1]}.")
    call = _call(x, gate, group_of_block, implementation, config, interpret)
    if row_scale is not None:
        row_scale = row_scale.astype(jnp.float32)
    return _gated(call, x, gate, up, group_of_block, row_scale)


def grouped_implementation(x, w, group_of_block, *, implementation=None, interpret=None) -> str:
    """The name of the implementation that `grouped_matmul` and `gated_matmul` pick for a call.

    Args:
        x, w, group_of_block: arrays or ShapeDtypeStructs.
    """
    case = _case(x, w, group_of_block, interpret)
    return choose(IMPLEMENTATIONS, case, implementation).name


def rows_of_blocks(num_items: int, num_groups: int, w: Matrices) -> int:
    """`block_rows` for items that are multiplied by `w`, up to the largest block that serves it.

    Args:
        num_items: how many items there are.
        num_groups: how many groups they have, those on other devices included.
        w: the matrices of this device's groups.
    """
    largest = grouped_mosaic.largest_block(w) if target().is_hopper else BLOCK
    return block_rows(num_items, num_groups, largest)


def _call(x, w, group_of_block, implementation, config, interpret) -> _GroupedCall:
    case = _case(x, w, group_of_block, interpret)
    check_groups(group_of_block, case.groups)
    chosen = choose(IMPLEMENTATIONS, case, implementation)
    return _GroupedCall(
        chosen, dataclasses.replace(case, config=resolve_config(chosen, case, config))
    )


def _case(x, w, group_of_block, interpret) -> GroupedCase:
    (R, D), (E, w_in, F), N = x.shape, w.shape, group_of_block.shape[0]
    if w_in != D:
        raise ValueError(f"w {w.shape} must be [groups, {D}, out], to multiply rows {x.shape}.")
    quantized = isinstance(w, QuantizedMatrix)
    w_dtype = x.dtype if quantized else w.dtype
    if x.dtype != w_dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} and w {w_dtype}; use one floating type for both.")
    if N == 0 or R % N:
        raise ValueError(f"{R} rows must be a positive multiple of the {N} blocks.")
    stored = (w.format, w.group_size) if quantized else (None, None)
    return GroupedCase(R // N, E, D, F, jnp.dtype(x.dtype).name, *stored, interpret)


def _described(w) -> str:
    """Dtype or format, and shape, of matrices: for comparing them and for messages."""
    if isinstance(w, QuantizedMatrix):
        return f"{w.format}{w.shape} with scales for {w.group_size} inputs"
    return f"{w.dtype}{w.shape}"


def _product(call: _GroupedCall, x, weights, group_of_block, row_scale=None, transposed=False):
    run = call.implementation.run.product
    return run(x, weights, group_of_block, row_scale, call.case, transposed=transposed)


def _weight_gradient(call: _GroupedCall, x, dy, group_of_block):
    if call.case.format is not None:
        return None
    run = call.implementation.run.weight_gradient
    return run(x, dy, group_of_block, call.case.groups, call.case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: _GroupedCall, x, w, group_of_block):
    return _product(call, x, (w,), group_of_block)


def _matmul_forward(call: _GroupedCall, x, w, group_of_block):
    return _matmul(call, x, w, group_of_block), (x, w, group_of_block)


def _matmul_backward(call: _GroupedCall, saved, dy):
    x, w, group_of_block = saved
    dx = _product(call, dy, (w,), group_of_block, transposed=True)
    return dx, _weight_gradient(call, x, dy, group_of_block), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(call: _GroupedCall, x, gate, up, group_of_block, row_scale):
    return _product(call, x, (gate, up), group_of_block, row_scale)


def _gated_forward(call: _GroupedCall, x, gate, up, group_of_block, row_scale):
    """Computes both products separately, because the backward pass needs each of them."""
    g, u = (_product(call, x, (w,), group_of_block) for w in (gate, up))
    hidden = _gate(g, u, row_scale)
    return hidden, (x, gate, up, group_of_block, row_scale, g, u)


def _gate(g, u, row_scale):
    scale = 1.0 if row_scale is None else row_scale[:, None]
    return (jax.nn.silu(scale * g.astype(jnp.float32)) * (scale * u)).astype(g.dtype)


def _gated_backward(call: _GroupedCall, saved, d_hidden):
    x, gate, up, group_of_block, row_scale, g, u = saved
    _, transpose = jax.vjp(_gate, g, u, row_scale)
    dg, du, d_scale = transpose(d_hidden)
    by_gate, by_up = (
        _product(call, dy, (w,), group_of_block, transposed=True).astype(jnp.float32)
        for dy, w in ((dg, gate), (du, up))
    )
    d_gate, d_up = (_weight_gradient(call, x, dy, group_of_block) for dy in (dg, du))
    return (by_gate + by_up).astype(x.dtype), d_gate, d_up, None, d_scale


_gated.defvjp(_gated_forward, _gated_backward)
