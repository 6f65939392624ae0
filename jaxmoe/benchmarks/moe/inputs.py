"""Random arguments for the cases of `jaxmoe benchmark moe`."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.moe.cases import ALL, PARTS, Case, matrix_shape, widths
from jaxmoe.config import Llama4Config
from pallas_kernels.quantized import quantize_matrix

DECISIVE = 16.0  # logit of the expert that a token is to choose; others' are about 1


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random arguments of a case."""

    x: jax.Array  # [T, D]
    score: jax.Array  # [T]
    experts: list[jax.Array]  # of each set, [T]
    weights: dict  # "experts": matrices [E, in, out]; for a layer, "router" and "shared" too


def random_inputs(case: Case) -> Inputs:
    """Of the shapes and formats of the case."""
    D, _, E = widths(case.config)
    x_key, score_key, weights_key = jax.random.split(jax.random.key(0), 3)
    weights = random_weights(case, weights_key)
    x = jax.random.normal(x_key, (case.tokens, D), jnp.bfloat16)
    experts = [jnp.asarray((case.experts + i) % E) for i in range(case.sets)]
    if case.part == "layer":
        x = persuaded(x, weights["router"], experts[0])
    score = jax.random.uniform(score_key, (case.tokens,), jnp.bfloat16, 0.1, 1)
    return Inputs(x, score, experts, weights)


def persuaded(x: jax.Array, router: jax.Array, experts: jax.Array) -> jax.Array:
    """Tokens moved along the router's columns, to choose the experts that they are to."""
    columns = router.T.astype(jnp.float32)
    towards = DECISIVE * columns / jnp.sum(columns**2, axis=1, keepdims=True)
    return (x + towards[experts]).astype(x.dtype)


def random_weights(case: Case, key: jax.Array) -> dict:
    """The parameters of a layer, as far as the case needs them."""
    D, _, E = widths(case.config)
    keys = jax.random.split(key, 7)
    experts = {
        name: _alike(random_matrix(case.config, name, case.format, key), E)
        for name, key in zip(PARTS[case.part], keys, strict=False)
    }
    if case.part != "layer":
        return {"experts": experts}
    shared = {
        name: random_matrix(case.config, name, "bf16", key)
        for name, key in zip(ALL, keys[3:6], strict=True)
    }
    router = D**-0.5 * jax.random.normal(keys[6], (D, E), jnp.bfloat16)
    return {"experts": experts, "shared": shared, "router": router}


def random_matrix(config: Llama4Config, name: str, format: str, key: jax.Array):
    """That keeps the size of what it multiplies."""
    inputs, outputs = matrix_shape(config, name)
    w = inputs**-0.5 * jax.random.normal(key, (inputs, outputs), jnp.bfloat16)
    return w if format == "bf16" else quantize_matrix(w, format)


def _alike(matrix, experts: int):
    """One for each expert, to need no memory beside the result."""

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (experts, *x.shape))

    return jax.jit(lambda matrix: jax.tree.map(repeated, matrix))(matrix)
