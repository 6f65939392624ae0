"""Llama 4's mixture of experts: sigmoid of the chosen router logits scales the experts' input.

Shape letters: B rows, S tokens a row, T = B * S, D embed, E experts, k experts a token.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.layers import linear, swiglu
from pallas_kernels.experts import (
    block_rows,
    combine,
    dispatch,
    gated_matmul,
    grouped_matmul,
    plan_exchange,
    plan_groups,
    send,
    send_back,
)

FEW_TOKENS = 64  # a device: up to so many, gathering all is quicker than sending each


class Routing(NamedTuple):
    """Where each token goes."""

    logits: Float[Array, "B S E"]
    expert: Int[Array, "B S k"]  # E for padding, which goes nowhere
    score: Float[Array, "B S k"]


def route(
    config: Llama4Config, router: Float[Array, "D E"], x: Float[Array, "B S D"], real: jax.Array
) -> Routing:
    """The k largest logits and their sigmoids (no softmax, no renormalization)."""
    logits = linear("BSD,DE->BSE", x, router)
    chosen, expert = lax.top_k(logits, config.num_experts_per_tok)
    score = jax.nn.sigmoid(chosen.astype(jnp.float32)).astype(x.dtype)
    return Routing(logits, jnp.where(real[..., None], expert, config.num_local_experts), score)


def moe(
    config: Llama4Config, p: dict, x: Float[Array, "B S D"], real: jax.Array
) -> tuple[Float[Array, "B S D"], Routing]:
    """Shared expert on x, plus the chosen experts on score * x."""
    routing = route(config, p["router"], x, real)
    routed = spread_over_mesh(config, p["experts"], x, routing)
    return swiglu(p["shared"], x) + routed, routing


def spread_over_mesh(
    config: Llama4Config, p: dict, x: Float[Array, "B S D"], routing: Routing
) -> Float[Array, "B S D"]:
    """Every device runs its experts on the tokens that chose them, wherever these are."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return run_experts(config.num_local_experts, 0, p, x, routing.expert, routing.score)
    tokens = (x, routing.expert, routing.score)
    token_spec = meshes.activation_spec(mesh, ("batch", "length", None), x.shape)
    up_spec = meshes.param_spec_at_use(("expert", "embed", "ffn"))
    down_spec = meshes.param_spec_at_use(("expert", "ffn", "embed"))
    p_spec = {"gate": up_spec, "up": up_spec, "down": down_spec}
    way = {"stay": _stay, "gather": _gather, "exchange": _exchange}[exchange_way(mesh, x.shape)]

    def body(p, *tokens):
        return lax.psum(way(config.num_local_experts, p, *tokens), meshes.RULES["ffn"])

    return meshes.per_device(body, (p_spec,) + 3 * (token_spec,), token_spec)(p, *tokens)


def exchange_way(mesh, shape: tuple[int, ...]) -> str:
    """How tokens [B, S, D] and experts meet on a mesh.

    "stay": the tokens are on all devices of the expert axis. Otherwise each has some of them, and
    all are gathered ("gather") if they are few, or each is sent to its expert ("exchange").
    """
    experts = meshes.RULES["expert"]
    if not set(experts) & set(meshes.activation_axes(mesh, "batch", shape[0])):
        return "stay"
    spread = [
        math.prod(mesh.shape[axis] for axis in meshes.activation_axes(mesh, logical, size))
        for logical, size in zip(("batch", "length"), shape[:2], strict=True)
    ]
    return "gather" if shape[0] * shape[1] // math.prod(spread) <= FEW_TOKENS else "exchange"


def _stay(num_experts: int, p: dict, x, expert, score):
    experts = meshes.RULES["expert"]
    first = lax.axis_index(experts) * p["down"].shape[0]
    return lax.psum(run_experts(num_experts, first, p, x, expert, score), experts)


def _gather(num_experts: int, p: dict, *tokens):
    experts = meshes.RULES["expert"]
    tokens = [lax.all_gather(z, experts, axis=0, tiled=True) for z in tokens]
    out = run_experts(num_experts, lax.axis_index(experts) * p["down"].shape[0], p, *tokens)
    return lax.psum_scatter(out, experts, scatter_dimension=0, tiled=True)


def _exchange(num_experts: int, p: dict, x, expert, score):
    """A token is sent once for each of its experts, with its expert and score as two numbers."""
    axis, here, D = meshes.RULES["expert"], p["down"].shape[0], x.shape[-1]
    items = jnp.broadcast_to(x[:, :, None], (*expert.shape, D)).reshape(-1, D)
    plan = plan_exchange(expert.reshape(-1) // here, axis)
    about = jnp.stack([expert + 1, score.astype(jnp.float32)], -1).reshape(-1, 2)
    about = send(plan, about, axis)  # expert 0: no row came
    came = about[:, 0] > 0
    expert_here = jnp.where(came, about[:, 0].astype(jnp.int32) - 1, num_experts)
    rows = send(plan, items, axis)
    first = lax.axis_index(axis) * here
    out = run_experts(
        num_experts, first, p, rows[None], expert_here[None, :, None], about[None, :, 1:]
    )
    return send_back(plan, out[0], axis).reshape(*expert.shape, D).sum(2)


def run_experts(
    num_experts: int,
    first: int | jax.Array,
    p: dict,
    x: Float[Array, "B S D"],
    expert: Int[Array, "B S k"],
    score: Float[Array, "B S k"],
) -> Float[Array, "B S D"]:
    """This device's experts, `first` and on, on the tokens that chose them; 0 for the others."""
    here = p["down"].shape[0]
    group = (expert - first).reshape(-1)
    group = jnp.where((group >= 0) & (group < here), group, here)
    plan = plan_groups(group, here, block_rows(group.shape[0], num_experts))
    choices = (*expert.shape, x.shape[-1])
    items = jnp.broadcast_to(x[:, :, None], choices).reshape(-1, x.shape[-1])
    rows, scale = dispatch(plan, items), dispatch(plan, score.reshape(-1, 1))[:, 0]
    hidden = gated_matmul(rows, p["gate"], p["up"], plan.group_of_block, scale)
    out = combine(plan, grouped_matmul(hidden, p["down"], plan.group_of_block))
    return out.reshape(*expert.shape, -1).sum(2)
