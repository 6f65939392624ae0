"""The model's steps with abstract arguments: to lower, to compile and to measure without data."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.config import Llama4Config
from jaxmoe.generation.batches import MOST_PIECES
from jaxmoe.mesh import activation_spec, sharding
from jaxmoe.model.kv_cache import abstract_cache
from jaxmoe.model.packing import Packing
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


def abstract_batch(mesh: Mesh, *, groups: int, rows: int, tokens: int) -> tuple[Inputs, dict]:
    """The new tokens of an engine's step that reads prompts, and what else `step` takes with them.

    Args:
        groups: groups of rows of the cache.
        rows: of a group.
        tokens: of a group, padding included.
    """
    everywhere = sharding(mesh, PartitionSpec())

    def array(*shape: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    new = array(groups, tokens)
    single = array(groups, tokens, dtype=jnp.bool_)
    packing = Packing(new, single, array(groups, min(MOST_PIECES, rows)))
    rest = {"restart": array(groups * rows, dtype=jnp.bool_), "previous": array(groups, rows)}
    return Inputs(new, new, new), {"packing": packing, **rest}
