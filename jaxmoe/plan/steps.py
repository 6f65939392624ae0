"""The model's steps with abstract arguments: to lower, to compile and to measure without data."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import activation_spec, sharding
from jaxmoe.model.kv_cache import abstract_cache
from jaxmoe.model.params import abstract_params
from jaxmoe.model.steps import Inputs, last_logits, step


def abstract_arguments(
    config: Llama4Config,
    mesh: Mesh,
    *,
    rows: int,
    tokens: int,
    capacity: int,
    weights=jnp.bfloat16,
    format: str | None = None,
    kv=jnp.bfloat16,
) -> tuple:
    """Parameters, new tokens and cache of a `step`, as ShapeDtypeStructs laid out over `mesh`.

    Args:
        rows, tokens: the shape of one step's new tokens.
        capacity: tokens a row of the cache holds.
        weights, kv: dtypes of the parameters and of the cache.
        format: how matrices are quantized; None for not at all.
    """
    spec = activation_spec(mesh, ("batch", "length"), (rows, tokens))
    new = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=sharding(mesh, spec))
    cache = abstract_cache(config, rows, capacity, kv, mesh)
    inputs = Inputs(new, new, new)  # pyrefly: ignore  # shapes for arrays
    return abstract_params(config, mesh, weights, format), inputs, cache


def lower_step(config: Llama4Config, mesh: Mesh, arguments: tuple) -> jax.stages.Lowered:
    """The step that makes each row's last logits, lowered for the mesh's devices.

    Args:
        arguments: what `abstract_arguments` returns.
    """
    with jax.set_mesh(mesh):
        return step.lower(config, *arguments, readout=last_logits)
