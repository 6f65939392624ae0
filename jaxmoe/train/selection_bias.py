"""Balancing the experts without a loss (Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3).

Each router has a bias for each expert, by which alone it chooses (`jaxmoe.model.moe`). No gradient
reaches it: after each step it moves up for experts that got less than the mean load, and down for
the others. It is one of the model's parameters, so that states and checkpoints hold it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.train.config import TrainConfig

NAME = "selection_bias"  # of the parameter, beside `router`


def model_of(config: TrainConfig, model: Llama4Config) -> Llama4Config:
    """The model that a run trains: one with selection biases, if the run moves them."""
    return dataclasses.replace(model, selection_bias=True) if config.selection_bias else model


def abstract_biases(model: Llama4Config, params: dict, mesh: jax.sharding.Mesh) -> dict:
    """The shapes of a model's parameters, with those of the biases that it lacks."""

    def make(shape: tuple[int, ...], layout: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

    return _completed(model, params, mesh, make)


def with_biases(model: Llama4Config, params: dict, mesh: jax.sharding.Mesh) -> dict:
    """A model's parameters, with biases of zero where it lacks them."""

    def make(shape: tuple[int, ...], layout: NamedSharding) -> jax.Array:
        return jnp.zeros(shape, jnp.float32, device=layout)

    return _completed(model, params, mesh, make)


def _completed(
    model: Llama4Config, params: dict, mesh: jax.sharding.Mesh, make: Callable[..., Any]
) -> dict:
    if not model.selection_bias:
        return params
    layout = meshes.sharding(mesh, PartitionSpec())

    def completed(layer: dict) -> dict:
        part = layer["feed_forward"]
        if "router" not in part or NAME in part:
            return layer
        return layer | {"feed_forward": part | {NAME: make((model.num_local_experts,), layout)}}

    return params | {"layers": [completed(layer) for layer in params["layers"]]}


def check_moves(config: TrainConfig, trained: dict, source: str) -> None:
    """Raises a UserError if a run is to move selection biases and trains none."""
    if config.selection_bias and not any(_biases(trained)):
        raise UserError(
            f"{source}: 'selection_bias' moves nothing, since no router's bias is trained; leave "
            "it out, or take the biases out of 'frozen'."
        )


def _biases(trained: dict) -> list[bool]:
    parts = (layer["feed_forward"] for layer in trained["layers"])
    return [part.get(NAME) is not None for part in parts]


def moved(trained: dict, assignments: Int[Array, "L E"], rate: float) -> dict:
    """The parameters with each bias moved by `rate` towards an even load.

    Args:
        trained: the parameters that are trained, with None in place of others.
        assignments: how many tokens each MoE layer's experts got in a step, all its batches
            together.
        rate: how far a bias moves.
    """
    counts = iter(assignments)

    def of_layer(layer: dict) -> dict:
        part = layer["feed_forward"]
        if NAME not in part:
            return layer
        load = next(counts)
        if part[NAME] is None:
            return layer
        return layer | {"feed_forward": part | {NAME: _moved(part[NAME], load, rate)}}

    return trained | {"layers": [of_layer(layer) for layer in trained["layers"]]}


def _moved(bias: Float[Array, "E"], load: Int[Array, "E"], rate: float) -> Float[Array, "E"]:
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(jnp.mean(load) - load)
