"""The model's steps with abstract arguments: to lower, to compile and to measure without data."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import activation_spec, sharding
from jaxmoe.model.kv_cache import Cache, abstract_cache
from jaxmoe.model.params import abstract_params
from jaxmoe.model.transformer import forward, unembed


def cached_step(config: Llama4Config, params, tokens, positions, segment_ids, cache: Cache):
    """Feeds new tokens; the logits of each row's last one, and the cache."""
    out = forward(config, params, tokens, positions, segment_ids, cache)
    return unembed(config, params, out.hidden[:, -1]), out.cache


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
    """What `cached_step` takes after the config, as ShapeDtypeStructs laid out over `mesh`.

    Args:
        rows, tokens: the shape of one step's new tokens.
        capacity: tokens a row of the cache holds.
        weights, kv: dtypes of the parameters and of the cache.
        format: of quantized matrices.
    """
    spec = activation_spec(mesh, ("batch", "length"), (rows, tokens))
    new = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=sharding(mesh, spec))
    cache = abstract_cache(config, rows, capacity, kv, mesh)
    return abstract_params(config, mesh, weights, format), new, new, new, cache


def lower_step(config: Llama4Config, mesh: Mesh, arguments: tuple) -> jax.stages.Lowered:
    """`cached_step` lowered for the mesh's devices, its cache donated."""
    step = jax.jit(cached_step, static_argnums=0, donate_argnums=5)
    with jax.set_mesh(mesh):
        return step.lower(config, *arguments)
