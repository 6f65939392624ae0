"""Llama 4's mixture of experts: sigmoid of the chosen router logits scales the experts' input.

Shape letters: B rows, S tokens a row, T = B * S, D embed, E experts, k experts a token.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.kernels import FASTEST, Kernels
from jaxmoe.model.layers import linear, swiglu
from jaxmoe.model.lora import (
    Lora,
    base_of,
    experts_gated,
    experts_matmul,
    index_of,
    with_index,
)
from jaxmoe.model.params import map_arrays, moe_specs
from pallas_kernels.experts import (
    combine,
    dispatch,
    make_group_metadata,
    plan_exchange,
    rows_of_blocks,
    send,
    send_back,
)

FEW_TOKENS = 64  # a device: up to so many, gathering all is quicker than sending each


class Routing(NamedTuple):
    """Where each token goes."""

    logits: Float[Array, "B S E"]
    expert: Int[Array, "B S k"]  # E for padding, which goes nowhere
    router_weight: Float[Array, "B S k"]


class RouterStats(NamedTuple):
    """How one layer's router spread the real tokens: plain arrays, a few numbers for each expert.

    They replace the router's logits, which would be B * S * E numbers kept for every layer.
    """

    assignments: Int[Array, "E"]  # how many the router made to each expert
    mean_probability: Float[Array, "E"]  # of the softmax of its logits, float32; differentiable
    entropy: Float[Array, ""]  # of that softmax, mean over tokens, in nats
    z: Float[Array, ""]  # squared log-sum-exp of the logits, mean over tokens; differentiable
    dropped: Int[Array, ""]  # assignments that came to no expert, counted where experts run
    tokens: Int[Array, ""]  # padding does not count here or above

    @property
    def load(self) -> Float[Array, "E"]:
        """The fraction of all assignments that each expert gets."""
        return self.assignments / jnp.maximum(jnp.sum(self.assignments), 1)

    @property
    def peak(self) -> Float[Array, ""]:
        """The largest load over the mean load: 1 is even, E is collapse."""
        return jnp.max(self.load) * self.assignments.shape[0]


def route(
    config: Llama4Config,
    router: Float[Array, "D E"] | Lora,
    x: Float[Array, "B S D"],
    real: Bool[Array, "B S"],
    choose: Callable[..., Routing] | None = None,
    bias: Float[Array, "E"] | None = None,
) -> Routing:
    """The router's logits, and what `choose`, by default Llama 4's, makes of them."""
    given = {} if bias is None else {"bias": bias}
    return (choose or choose_experts)(config, linear("BSD,DE->BSE", x, router), real, **given)


def choose_experts(
    config: Llama4Config,
    logits: Float[Array, "B S E"],
    real: Bool[Array, "B S"],
    bias: Float[Array, "E"] | None = None,
) -> Routing:
    """The k largest logits and their sigmoids (no softmax, no renormalization).

    Args:
        bias: added to the sigmoids to choose by, and to nothing else (Wang et al., arXiv
            2408.15664, equation 3); it has no gradient.
    """
    ranked = logits if bias is None else _biased(logits, bias)
    if config.num_experts_per_tok == 1:  # top_k would sort all
        expert = jnp.argmax(ranked, axis=-1, keepdims=True)
        is_chosen = jnp.arange(logits.shape[-1]) == expert
        chosen = jnp.sum(jnp.where(is_chosen, logits, 0), axis=-1, keepdims=True)
    else:
        chosen, expert = lax.top_k(ranked, config.num_experts_per_tok)
        if bias is not None:
            is_chosen = jnp.arange(logits.shape[-1]) == expert[..., None]
            chosen = jnp.sum(jnp.where(is_chosen, logits[..., None, :], 0), axis=-1)
    weight = jax.nn.sigmoid(chosen.astype(jnp.float32)).astype(logits.dtype)
    return Routing(logits, jnp.where(real[..., None], expert, config.num_local_experts), weight)


def _biased(logits: Float[Array, "B S E"], bias: Float[Array, "E"]) -> Float[Array, "B S E"]:
    scores = jax.nn.sigmoid(logits.astype(jnp.float32)) + bias.astype(jnp.float32)
    return lax.stop_gradient(scores)


def moe(
    config: Llama4Config,
    p: dict,
    x: Float[Array, "B S D"],
    real: Bool[Array, "B S"],
    kernels: Kernels = FASTEST,
    *,
    choose: Callable[..., Routing] | None = None,
    weigh_output: bool = False,
) -> tuple[Float[Array, "B S D"], RouterStats]:
    """Shared expert on x, plus the chosen experts on router weight * x.

    Args:
        p: the layer's parameters, as in `moe_specs`.
        real: which tokens are no padding.
        kernels: what the experts run on.
        choose: what makes a routing of the router's logits; default: `choose_experts`. Where the
            model has a selection bias, it is called with that as `bias`.
        weigh_output: multiplies the experts' output by the router weight, as most other models
            do, instead of their input.
    """
    routing = route(config, p["router"], x, real, choose, p.get("selection_bias"))
    routed, reached = spread_over_mesh(config, p["experts"], x, routing, kernels, weigh_output)
    return swiglu(p["shared"], x) + routed, router_stats(routing, real, reached)


def router_stats(
    routing: Routing, real: Bool[Array, "B S"], reached: Int[Array, ""]
) -> RouterStats:
    """Statistics of a layer's routing, without its logits.

    Args:
        routing: of all tokens, wherever they lie on the mesh.
        real: which tokens are no padding.
        reached: how many assignments came to their expert; see `spread_over_mesh`.
    """
    E, k = routing.logits.shape[-1], routing.expert.shape[-1]
    assignments = jnp.sum(jax.nn.one_hot(routing.expert, E, dtype=jnp.int32), axis=(0, 1, 2))
    logits = routing.logits.astype(jnp.float32)
    log_p, log_sum_exp = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = _mean_of_real(-jnp.sum(p * log_p, axis=-1), real)
    tokens = jnp.sum(real)
    means = _mean_of_real(p, real), entropy, _mean_of_real(log_sum_exp**2, real)
    return RouterStats(assignments, *means, k * tokens - reached, tokens)


def _mean_of_real(x: Float[Array, "B S *rest"], real: Bool[Array, "B S"]) -> Float[Array, "*rest"]:
    mask = real.reshape(*real.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(mask, x, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1)


def spread_over_mesh(
    config: Llama4Config,
    p: dict,
    x: Float[Array, "B S D"],
    routing: Routing,
    kernels: Kernels = FASTEST,
    weigh_output: bool = False,
) -> tuple[Float[Array, "B S D"], Int[Array, ""]]:
    """Every device runs its experts on the tokens that chose them, wherever these are.

    Returns:
        The experts' sum for each token, and how many assignments came to a device of their expert:
        counted there, after the journey, so that a lost one shows.
    """
    mesh = meshes.current_mesh()
    tokens = (x, routing.expert, routing.router_weight)
    if (index := index_of(p)) is not None:  # of the tokens' adapters, which travel with them
        p, tokens = with_index(p, None), (*tokens, index[..., None])
    options = {"kernels": kernels, "weigh_output": weigh_output}
    run = functools.partial(_run_counted, config.num_local_experts, **options)
    if mesh is None:
        return run(0, p, *tokens)
    token_spec = meshes.activation_spec(mesh, ("batch", "length", None), x.shape)
    specs = moe_specs(config)["experts"]
    p_spec = map_arrays(lambda w, axes: meshes.param_spec_at_use(axes), specs, p)
    modes = {"replicated": _replicated, "all_gather": _all_gather, "all_to_all": _all_to_all}
    exchange = modes[expert_exchange(mesh, x.shape)]
    counted_over = {*meshes.token_axes(mesh, x.shape), *meshes.RULES["expert"]}

    def body(p, *tokens):
        out, reached = exchange(run, p, *tokens)
        return lax.psum(out, meshes.RULES["ffn"]), lax.psum(reached, tuple(sorted(counted_over)))

    out_specs = (token_spec, PartitionSpec())
    return meshes.per_device(body, (p_spec,) + len(tokens) * (token_spec,), out_specs)(p, *tokens)


def expert_exchange(mesh, shape: tuple[int, ...]) -> str:
    """How tokens reach experts on other devices: "replicated", "all_gather" or "all_to_all".

    It depends on sizes alone, so it is chosen when a step is traced, and can be asked for without
    devices: `print(expert_exchange(mesh, (rows, tokens, embed)))`.

    - "replicated": all devices of the `expert` axis have the same tokens, because the axis has one
      device or does not divide the rows. Each runs its experts on them, and results are summed.
    - "all_gather": each device has a part of the rows and few tokens, up to `FEW_TOKENS`, as in
      decoding. All tokens are gathered on all devices, and results are summed and scattered.
    - "all_to_all": each device has more tokens, as in prefill and training. A token is sent to the
      devices of its experts and back.

    Args:
        mesh: a mesh or abstract mesh with the axes of `jaxmoe.mesh.AXES`.
        shape: the shape [B, S, D] of the layer's input over the whole mesh.
    """
    if not set(meshes.RULES["expert"]) & set(meshes.activation_axes(mesh, "batch", shape[0])):
        return "replicated"
    devices = math.prod(mesh.shape[axis] for axis in meshes.token_axes(mesh, shape))
    return "all_gather" if shape[0] * shape[1] // devices <= FEW_TOKENS else "all_to_all"


def _replicated(run: Callable, p: dict, *tokens):
    out, reached = run(_first_expert(p), p, *tokens)
    return lax.psum(out, meshes.RULES["expert"]), reached


def _all_gather(run: Callable, p: dict, *tokens):
    experts = meshes.RULES["expert"]
    tokens = [lax.all_gather(z, experts, axis=0, tiled=True) for z in tokens]
    out, reached = run(_first_expert(p), p, *tokens)
    return lax.psum_scatter(out, experts, scatter_dimension=0, tiled=True), reached


def _all_to_all(run: Callable, p: dict, x, expert, weight, *adapter):
    """A token is sent once for each of its experts, with expert, weight and adapter as numbers."""
    axis, here, D = meshes.RULES["expert"], p["down"].shape[0], x.shape[-1]
    items = jnp.broadcast_to(x[:, :, None], (*expert.shape, D)).reshape(-1, D)
    plan = plan_exchange(expert.reshape(-1) // here, axis)
    numbers = (expert + 1, weight, *(jnp.broadcast_to(z, expert.shape) for z in adapter))
    about = jnp.stack([z.astype(jnp.float32) for z in numbers], -1).reshape(-1, len(numbers))
    about = send(plan, about, axis)  # expert 0: no row came
    came = about[:, 0] > 0
    no_expert = lax.axis_size(axis) * here
    expert_here = jnp.where(came, about[:, 0].astype(jnp.int32) - 1, no_expert)
    tokens = (send(plan, items, axis)[None], expert_here[None, :, None], about[None, :, 1:2])
    tokens += (about[None, :, 2:],) if adapter else ()
    out, reached = run(_first_expert(p), p, *tokens)
    return send_back(plan, out[0], axis).reshape(*expert.shape, D).sum(2), reached


def _first_expert(p: dict) -> jax.Array:
    """The index, among all experts, of the first that this device has."""
    return lax.axis_index(meshes.RULES["expert"]) * p["down"].shape[0]


def _run_counted(num_experts: int, first: int | jax.Array, p: dict, x, expert, *rest, **options):
    """`run_experts`, and how many of the assignments were for the experts here."""
    here = (expert >= first) & (expert < first + p["down"].shape[0])
    return run_experts(num_experts, first, p, x, expert, *rest, **options), jnp.sum(here)


def run_experts(
    num_experts: int,
    first: int | jax.Array,
    p: dict,
    x: Float[Array, "B S D"],
    expert: Int[Array, "B S k"],
    weight: Float[Array, "B S k"],
    adapter: Shaped[Array, "B S 1"] | None = None,
    kernels: Kernels = FASTEST,
    weigh_output: bool = False,
) -> Float[Array, "B S D"]:
    """This device's experts, `first` and on, on the tokens that chose them; 0 for the others.

    Args:
        num_experts: how many there are on all devices together.
        expert: each token's experts, counted over all devices.
        adapter: each token's adapter of a `LoraSet`.
        weigh_output: as for `moe`.
    """
    here = p["down"].shape[0]
    group = (expert - first).reshape(-1)
    group = jnp.where((group >= 0) & (group < here), group, here)
    block = rows_of_blocks(group.shape[0], num_experts, base_of(p["gate"]))
    plan = make_group_metadata(group, here, block)
    choices = (*expert.shape, x.shape[-1])
    items = jnp.broadcast_to(x[:, :, None], choices).reshape(-1, x.shape[-1])
    moves = {"implementation": kernels.dispatch, "interpret": kernels.interpret}
    products = {"implementation": kernels.experts, "interpret": kernels.interpret}
    rows = dispatch(plan, items, **moves)
    of_scores = "xla" if kernels.dispatch else None  # other kernels serve no columns
    column = functools.partial(dispatch, plan, implementation=of_scores)
    scale = column(weight.reshape(-1, 1))[:, 0]
    if adapter is not None:
        index = jnp.broadcast_to(adapter, expert.shape).reshape(-1, 1).astype(jnp.float32)
        p = with_index(p, column(index)[:, 0].astype(jnp.int32))
    matrices = p["gate"], p["up"], plan.group_of_block, None if weigh_output else scale
    hidden = experts_gated(rows, *matrices, **products)
    out = experts_matmul(hidden, p["down"], plan.group_of_block, **products)
    if weigh_output:
        out = (out * scale[:, None].astype(jnp.float32)).astype(out.dtype)
    out = combine(plan, out, **moves)
    return out.reshape(*expert.shape, -1).sum(2)
