"""Random arguments for the cases of `jaxmoe benchmark moe`."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.moe.cases import ALL, PARTS, Case, matrix_shape, widths
from jaxmoe.config import Llama4Config
from pallas_kernels.quantized import quantize_matrix

DECISIVE = 16.0  # the logit of a token's intended expert; all others are about 1


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random arguments of a case.

    Attributes:
        x: tokens [T, D].
        router_weight: [T].
        experts: for each of the case's sets, the expert of each token, [T].
        weights: the parameters: "experts" with matrices [E, in, out], and for a layer "router" and
            "shared".
    """

    x: jax.Array
    router_weight: jax.Array
    experts: list[jax.Array]
    weights: dict


def random_inputs(case: Case) -> Inputs:
    """Random arrays of the case's shapes and formats."""
    D, _, E = widths(case.config)
    x_key, score_key, weights_key = jax.random.split(jax.random.key(0), 3)
    weights = random_weights(case, weights_key)
    x = jax.random.normal(x_key, (case.tokens, D), jnp.bfloat16)
    experts = [jnp.asarray((case.experts + i) % E) for i in range(case.sets)]
    if case.part == "layer":
        x = steer_to_experts(x, weights["router"], experts[0])
    router_weight = jax.random.uniform(score_key, (case.tokens,), jnp.bfloat16, 0.1, 1)
    return Inputs(x, router_weight, experts, weights)


def steer_to_experts(x: jax.Array, router: jax.Array, experts: jax.Array) -> jax.Array:
    """Shifts tokens so that the router chooses the given expert for each.

    Each token moves along its expert's column of the router, which raises that logit by DECISIVE.
    """
    columns = router.T.astype(jnp.float32)
    shift = DECISIVE * columns / jnp.sum(columns**2, axis=1, keepdims=True)
    return (x + shift[experts]).astype(x.dtype)


def random_weights(case: Case, key: jax.Array) -> dict:
    """Random parameters of a layer, of which only those that the case needs are made."""
    D, _, E = widths(case.config)
    keys = jax.random.split(key, 7)
    experts = {
        name: _repeated(random_matrix(case.config, name, case.format, key), E)
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
    """A random matrix, scaled so that its outputs have the variance of its inputs."""
    inputs, outputs = matrix_shape(config, name)
    w = inputs**-0.5 * jax.random.normal(key, (inputs, outputs), jnp.bfloat16)
    return w if format == "bf16" else quantize_matrix(w, format)


def _repeated(matrix, experts: int):
    """Copies one matrix to every expert; making the result needs no further memory."""

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (experts, *x.shape))

    return jax.jit(lambda matrix: jax.tree.map(repeated, matrix))(matrix)
