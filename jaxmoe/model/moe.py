"""Llama 4's mixture of experts: sigmoid of the chosen router logits scales the experts' input.

Shape letters: B rows, S tokens a row, T = B * S, D embed, E experts, k experts a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.layers import linear, swiglu
from pallas_kernels.grouped_matmul import block_rows, combine, dispatch, grouped_matmul, plan_groups


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
    """Every device runs its experts on the tokens of its expert group; the results are summed."""
    run = functools.partial(run_experts, config.num_local_experts)
    mesh = meshes.current_mesh()
    if mesh is None:
        return run(0, p, x, routing.expert, routing.score)
    experts, ffn = meshes.RULES["expert"], meshes.RULES["ffn"]
    rows_apart = bool(set(experts) & set(meshes.activation_axes(mesh, "batch", x.shape[0])))

    def body(p, *tokens):
        if rows_apart:
            tokens = [lax.all_gather(z, experts, axis=0, tiled=True) for z in tokens]
        first = lax.axis_index(experts) * p["down"].shape[0]
        out = lax.psum(run(first, p, *tokens), ffn)
        if rows_apart:
            return lax.psum_scatter(out, experts, scatter_dimension=0, tiled=True)
        return lax.psum(out, experts)

    tokens = (x, routing.expert, routing.score)
    token_spec = meshes.activation_spec(mesh, ("batch", "length", None), x.shape)
    up_spec = meshes.param_spec_at_use(("expert", "embed", "ffn"))
    down_spec = meshes.param_spec_at_use(("expert", "ffn", "embed"))
    p_spec = {"gate": up_spec, "up": up_spec, "down": down_spec}
    return meshes.per_device(body, (p_spec,) + 3 * (token_spec,), token_spec)(p, *tokens)


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
    scaled = (x[:, :, None] * score[..., None]).reshape(-1, x.shape[-1])
    rows = dispatch(plan, scaled)
    multiply = functools.partial(grouped_matmul, group_of_block=plan.group_of_block)
    hidden = jax.nn.silu(multiply(rows, p["gate"])) * multiply(rows, p["up"])
    out = combine(plan, multiply(hidden, p["down"]))
    return out.reshape(*expert.shape, -1).sum(2)
