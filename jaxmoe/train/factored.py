"""Adafactor's second moments: of each matrix the means over rows and over columns.

Section 3 to 6 of Adafactor (Shazeer and Stern 2018), without relative step sizes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmoe.train.matrices import MatrixAxes, axes_of

LEAST = 128  # matrices with a shorter side keep every second moment
EPSILON = 1e-30
LARGEST = 1.0  # the root mean square of a matrix's update is at most this


class FactoredState(NamedTuple):
    """The second moments.

    Attributes:
        count: updates so far, int32.
        rows: means over each matrix's outputs, whose axes have the size 1; of a vector and of a
            small matrix every second moment.
        columns: means over each matrix's inputs, whose axes have the size 1; one zero where `rows`
            has everything.
    """

    count: jax.Array
    rows: Any
    columns: Any


def scale_by_factored_moments(least: int = LEAST) -> optax.GradientTransformation:
    """Divides gradients by the root of their factored second moments, and bounds what remains.

    Args:
        least: the shortest side of a matrix that is factored.
    """

    def init(params: Any) -> FactoredState:
        axes = _axes(params, least)
        rows = jax.tree.map(lambda p, a: jnp.zeros(_shape(p, a and a.outputs)), params, axes)
        return FactoredState(jnp.int32(0), rows, jax.tree.map(_columns, params, axes))

    def update(updates: Any, state: Any, params: Any = None):
        kept = 1 - (state.count + 1.0) ** -0.8
        scaled = functools.partial(_scaled, kept)
        found = jax.tree.map(scaled, updates, state.rows, state.columns, _axes(updates, least))
        parts = (jax.tree.map(lambda _, x, i=i: x[i], updates, found) for i in range(3))
        updates, rows, columns = parts
        return updates, FactoredState(state.count + 1, rows, columns)

    return optax.GradientTransformation(init, update)


def _axes(params: Any, least: int) -> Any:
    """The axes of the matrices that are factored, False for other parameters."""

    def factored(p: Any, axes: Any) -> Any:
        sides = [] if axes is None else [math.prod(p.shape[i] for i in side) for side in axes]
        return axes if sides and min(sides) >= least else False

    return jax.tree.map(factored, params, axes_of(params))


def _shape(p: Any, summed: Any) -> tuple[int, ...]:
    return tuple(1 if summed and i in summed else n for i, n in enumerate(p.shape))


def _columns(p: Any, axes: Any) -> jax.Array:
    return jnp.zeros(_shape(p, axes.inputs if axes else range(p.ndim)))


def _scaled(
    kept: jax.Array,
    gradient: Float[Array, "..."],
    rows: Float[Array, "..."],
    columns: Float[Array, "..."],
    axes: MatrixAxes | bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bounded update of a parameter, and its new moments."""
    square = gradient**2 + EPSILON

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
        return kept * old + (1 - kept) * new

    if isinstance(axes, bool):
        rows, over = mixed(rows, square), tuple(range(gradient.ndim))
        update = gradient * jax.lax.rsqrt(rows)
    else:
        over = axes.inputs + axes.outputs
        rows = mixed(rows, square.mean(axes.outputs, keepdims=True))
        columns = mixed(columns, square.mean(axes.inputs, keepdims=True))
        share = rows / rows.mean(axes.inputs, keepdims=True)
        update = gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns)
    size = jnp.sqrt(jnp.mean(update**2, over, keepdims=True))
    return update / jnp.maximum(1.0, size / LARGEST), rows, columns
