"""Muon: steps along a running mean of gradients whose matrices are made orthogonal.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). A matrix has to be whole for that:
of experts each device takes some, and other matrices follow one after the other, since a model's
matrices in float32 are never to be on one device together.

Shape letters: N matrices, R rows, C columns.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.mesh import constrain
from jaxmoe.train.matrices import matrix_axes
from jaxmoe.train.partition import dotted

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x x' x and (x x')^2 x, by Jordan et al.
ITERATIONS = 5
SMALLEST = 1e-8  # is added to a matrix's norm, which may be 0


class MuonState(NamedTuple):
    """The running mean.

    Attributes:
        count: updates so far, int32.
        mean: of the gradients, like the parameters.
    """

    count: jax.Array
    mean: Any


def scale_by_orthogonal_mean(beta: float, dtype: Any) -> optax.GradientTransformation:
    """Replaces gradients of matrices by their running mean, made orthogonal.

    Args:
        beta: how much of the mean each step keeps; it looks one step ahead, as Nesterov's.
        dtype: of the mean between steps.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), optax.tree.zeros_like(params, dtype=dtype))

    def update(updates: Any, state: Any, params: Any = None):
        mean, count = optax.tree.update_moment(updates, state.mean, beta, 1), state.count + 1
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(mean, beta, count + 1),
            optax.tree.bias_correction(updates, beta, count),
        )
        return _orthogonal(ahead), MuonState(count, optax.tree.cast(mean, dtype))

    return optax.GradientTransformation(init, update)


def _orthogonal(params: Any) -> Any:
    """The orthogonal matrices nearest to those of each parameter, made one after the other."""
    leaves, structure = jax.tree.flatten_with_path(params)
    done: list = []
    for path, x in leaves:
        if done:  # else XLA gathers the matrices of all layers at once
            x, done[-1] = lax.optimization_barrier((x, done[-1]))
        axes = matrix_axes(dotted(path), x.ndim)
        assert axes is not None  # vectors are AdamW's
        shape = [math.prod(x.shape[i] for i in side) for side in axes]
        matrices = constrain(x.reshape(-1, *shape), "matrices", None, None)
        done.append(newton_schulz(matrices).reshape(x.shape))
    return structure.unflatten(done)


def newton_schulz(x: Float[Array, "N R C"]) -> Float[Array, "N R C"]:
    """Matrices with the singular vectors of `x` and singular values of about 1."""
    if x.shape[1] > x.shape[2]:
        return newton_schulz(x.mT).mT
    a, b, c = COEFFICIENTS
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + SMALLEST
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x
