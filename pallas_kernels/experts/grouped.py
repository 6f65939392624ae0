"""`grouped_matmul` and `gated_matmul`: rows in blocks, each block with the matrix of its group.

Shape letters: R rows, N blocks of R / N rows, E groups, D in, F out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import Implementation, choose, resolve_config
from pallas_kernels.experts import grouped_megablox, grouped_mosaic, grouped_xla
from pallas_kernels.experts.checks import check_groups
from pallas_kernels.quantized import QuantizedMatrix

Matrices = Float[Array, "E D F"] | QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """One call as known at trace time."""

    block: int  # rows
    groups: int
    width_in: int
    width_out: int
    dtype: str  # of the rows, and of matrices unless these are quantized
    format: str | None = None  # of quantized matrices
    scale_width: int | None = None  # inputs that share a scale
    interpret: Any = None
    config: Any = None


# Fastest first. Each `run` is a module with `product` and `weight_gradient`.
IMPLEMENTATIONS = (
    Implementation(
        "mosaic_gpu",
        grouped_mosaic.why_not,
        grouped_mosaic,
        grouped_mosaic.Config,
        lambda case: grouped_mosaic.Config(),
    ),
    Implementation(
        "megablox",
        grouped_megablox.why_not,
        grouped_megablox,
        grouped_megablox.Config,
        grouped_megablox.config_for,
    ),
    Implementation(
        "xla", lambda case: None, grouped_xla, grouped_xla.Config, lambda case: grouped_xla.Config()
    ),
)


@dataclasses.dataclass(frozen=True)
class _Static:
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
    """`x[rows of block i] @ w[group_of_block[i]]`, in float32 sums, differentiable in reverse mode.

    Quantized matrices are constants: no gradient reaches them, but one reaches x.

    Args:
        group_of_block: ascending; E for a block without rows, which costs nothing. What the result
            holds in such a block is undefined. Values are trusted, unless JAXMOE_DEBUG_CHECKS=1.
        implementation: "mosaic_gpu", "megablox" or "xla"; None for the fastest that serves the
            call, which `grouped_implementation` names.
        config: sizes, a `Config` of that implementation.
        interpret: runs a kernel without its hardware: `plgpu.InterpretGPUParams()` for
            "mosaic_gpu", True for "megablox".

    Raises:
        ValueError: if the arguments do not fit together, or the named implementation does not
            serve them; says which value and what is allowed.
    """
    static = _static(x, w, group_of_block, implementation, config, interpret)
    return _matmul(static, x, w, group_of_block)


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
    """silu(s * x @ gate) * (s * x @ up) by blocks as `grouped_matmul`, both matrices at once.

    Args:
        row_scale: s, applied to the products in float32; scaling rows commutes with the matmul.
    """
    if _spelled(gate) != _spelled(up):
        raise ValueError(f"gate {_spelled(gate)} and up {_spelled(up)} must be alike.")
    if row_scale is not None and row_scale.shape != x.shape[:1]:
        raise ValueError(f"row_scale has shape {row_scale.shape}; it must be {x.shape[:1]}.")
    static = _static(x, gate, group_of_block, implementation, config, interpret)
    if row_scale is not None:
        row_scale = row_scale.astype(jnp.float32)
    return _gated(static, x, gate, up, group_of_block, row_scale)


def grouped_implementation(x, w, group_of_block, *, implementation=None, interpret=None) -> str:
    """The implementation that `grouped_matmul` and `gated_matmul` pick for such arguments.

    Args:
        x, w, group_of_block: arrays or ShapeDtypeStructs.
    """
    case = _case(x, w, group_of_block, interpret)
    return choose(IMPLEMENTATIONS, case, implementation).name


def _static(x, w, group_of_block, implementation, config, interpret) -> _Static:
    case = _case(x, w, group_of_block, interpret)
    check_groups(group_of_block, case.groups)
    chosen = choose(IMPLEMENTATIONS, case, implementation)
    return _Static(chosen, dataclasses.replace(case, config=resolve_config(chosen, case, config)))


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
    stored = (w.format, w.width) if quantized else (None, None)
    return GroupedCase(R // N, E, D, F, jnp.dtype(x.dtype).name, *stored, interpret)


def _spelled(w) -> str:
    """Type and shape, for comparing and for messages."""
    if isinstance(w, QuantizedMatrix):
        return f"{w.format}{w.shape} with scales for {w.width} inputs"
    return f"{w.dtype}{w.shape}"


def _product(static: _Static, x, weights, group_of_block, row_scale=None, transposed=False):
    run = static.implementation.run.product
    return run(x, weights, group_of_block, row_scale, static.case, transposed=transposed)


def _weight_gradient(static: _Static, x, dy, group_of_block):
    if static.case.format is not None:
        return None
    run = static.implementation.run.weight_gradient
    return run(x, dy, group_of_block, static.case.groups, static.case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static: _Static, x, w, group_of_block):
    return _product(static, x, (w,), group_of_block)


def _matmul_forward(static: _Static, x, w, group_of_block):
    return _matmul(static, x, w, group_of_block), (x, w, group_of_block)


def _matmul_backward(static: _Static, saved, dy):
    x, w, group_of_block = saved
    dx = _product(static, dy, (w,), group_of_block, transposed=True)
    return dx, _weight_gradient(static, x, dy, group_of_block), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(static: _Static, x, gate, up, group_of_block, row_scale):
    return _product(static, x, (gate, up), group_of_block, row_scale)


def _gated_forward(static: _Static, x, gate, up, group_of_block, row_scale):
    """Apart, to keep what the backward pass needs of each."""
    g, u = (_product(static, x, (w,), group_of_block) for w in (gate, up))
    hidden = _gate(g, u, row_scale)
    return hidden, (x, gate, up, group_of_block, row_scale, g, u)


def _gate(g, u, row_scale):
    scale = 1.0 if row_scale is None else row_scale[:, None]
    return (jax.nn.silu(scale * g.astype(jnp.float32)) * (scale * u)).astype(g.dtype)


def _gated_backward(static: _Static, saved, d_hidden):
    x, gate, up, group_of_block, row_scale, g, u = saved
    _, transpose = jax.vjp(_gate, g, u, row_scale)
    dg, du, d_scale = transpose(d_hidden)
    by_gate, by_up = (
        _product(static, dy, (w,), group_of_block, transposed=True).astype(jnp.float32)
        for dy, w in ((dg, gate), (du, up))
    )
    d_gate, d_up = (_weight_gradient(static, x, dy, group_of_block) for dy in (dg, du))
    return (by_gate + by_up).astype(x.dtype), d_gate, d_up, None, d_scale


_gated.defvjp(_gated_forward, _gated_backward)
