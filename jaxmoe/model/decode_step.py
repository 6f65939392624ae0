"""A decoder layer for few new tokens on H100, H200 and TPUs: few launches, two all-reduces.

It computes what `transformer.decoder_layer` computes. There, each line is an operation or several,
and launching them takes longer than reading the weights; here each line is a kernel. A fork that
changes `decoder_layer` changes this too, or turns it off: `forward(..., fused=False)`.

A residual sum is taken together with the norm that follows it, so a layer hands over what is still
to be added. Shape letters: B rows, or lines of packing, of a device, S tokens of each, T = B * S, C
this rounded up to 8, D embed, H query heads, K key/value heads, d head size, E experts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmoe import mesh as meshes
from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.model.attention import Step
from jaxmoe.model.kv_cache import (
    Cache,
    LayerCache,
    cache_kind,
    keys_spec,
    pool_spec,
    row_axes,
    row_groups,
)
from jaxmoe.model.lora import is_lora
from jaxmoe.model.moe import RouterStats, choose_experts, expert_exchange, router_stats
from jaxmoe.model.packing import Packing
from jaxmoe.model.params import layer_specs, map_arrays
from jaxmoe.model.sequence import merge_over_devices
from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention import Coords, decode_attention
from pallas_kernels.attention.decode_config import PAGE_UNIT
from pallas_kernels.experts.tpu_products import why_not_quantized
from pallas_kernels.mosaic import why_not_hopper
from pallas_kernels.quantized import QuantizedMatrix
from pallas_kernels.step import (
    MAX_TOKENS,
    HeadPlan,
    add_rms_norm,
    busy_experts,
    experts_down,
    experts_gate_up,
    matmul_few,
    why_not_few,
    why_not_norm,
    why_not_widths,
    write_heads,
)
from pallas_kernels.tpu import why_not_tpu

HEAD_DIM = 128
MOST_COLUMNS = 24  # query heads that share a key head


class Residual(NamedTuple):
    """The residual stream between layers, as a sum of two terms that is not yet taken."""

    x: Float[Array, "B S D"]
    more: Float[Array, "C D"] | None  # float32; of each device's tokens


def residual_stream(residual: Residual, rows: int) -> Float[Array, "B S D"]:
    """The sum, rounded as `final_norm` and the next layer round it; `rows` are the cache's."""

    def body(residual):
        if residual.more is None:
            return residual.x
        x = residual.x.reshape(-1, residual.x.shape[-1])
        return (x + residual.more[: len(x)].astype(x.dtype)).reshape(residual.x.shape)

    return _of_each_row(body, rows, residual)


def final_norm(
    config: Llama4Config, interpret: Any, weight: Float[Array, "D"], residual: Residual, rows: int
) -> Float[Array, "B S D"]:
    """The last residual sum and the final norm; `rows` are the cache's."""

    def body(residual, weight):
        x = residual.x.reshape(-1, residual.x.shape[-1])
        normed = add_rms_norm(x, residual.more, weight, config.rms_norm_eps, interpret=interpret)[1]
        return normed.reshape(residual.x.shape)

    return _of_each_row(body, rows, residual, weight)


def _of_each_row(body: Callable, rows: int, residual: Residual, *replicated: jax.Array):
    """Runs `body` on each device's rows of the residual, and on arrays that all devices have."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return body(residual, *replicated)
    row_spec = meshes.sharded_spec(mesh, row_axes(mesh, rows))
    specs = row_spec, *(PartitionSpec() for _ in replicated)
    return meshes.per_device(body, specs, row_spec)(residual, *replicated)


def why_not_fused(
    config: Llama4Config,
    params: dict,
    x,
    cache: Cache | None,
    interpret: Any = None,
    packing: Packing | None = None,
) -> str | None:
    """Why the kernels of this module do not serve a step, or None; known while tracing.

    Args:
        x: the embedded tokens [B, S, D] of all devices, or a ShapeDtypeStruct.
        packing: as for `transformer.forward`.
        interpret: `plgpu.InterpretGPUParams()` or `pltpu.InterpretParams()`, where kernels are to
            run without their hardware.
    """
    (lines, tokens, _), dtype = x.shape, x.dtype
    in_lines = tokens == 1 if packing is None else packing.pieces is None
    if cache is None or not in_lines:
        return "it is a step of one new token a row, or of lines, with a cache"
    if tokens != 1 and why_not_tpu(interpret) is None:
        return "it takes lines of one token on TPUs, which write one token to a page in a step"
    mesh = meshes.current_mesh()
    if mesh is not None and expert_exchange(mesh, x.shape) != "replicated":
        return "it takes meshes on which tokens need not travel to their experts"
    tensor = 1 if mesh is None else meshes.axis_size(mesh, "ffn")
    if any(map(is_lora, jax.tree.leaves(params["layers"], is_leaf=is_lora))):
        return "it takes matrices without adapters; merge_adapters makes them so"
    if config.selection_bias:
        return "it takes routers without a selection bias"
    weights = jax.tree.leaves(params["layers"], is_leaf=_is_matrix)
    kinds = {(w.format, w.group_size) for w in weights if _is_matrix(w)}
    if kinds and why_not_tpu(interpret) is not None:
        return "it takes matrices that are not quantized"
    width = config.intermediate_size // tensor  # of experts, which are stored as one array
    for kind in kinds:
        if reason := why_not_quantized(*kind, width, config.num_local_experts, interpret):
            return reason
    tokens *= lines // row_groups(len(cache.length))
    if reason := why_not_sizes(config, tensor, tokens, jnp.dtype(dtype).name):
        return reason
    if why_not_tpu(interpret) is None:
        return why_not_widths(feed_forward_widths(config, tensor))
    return why_not_hopper(interpret)


def why_not_sizes(
    config: Llama4Config, tensor: int, tokens: int, dtype: str = "bfloat16"
) -> str | None:
    """Why the kernels of this module do not take a model's sizes, or None.

    Args:
        tensor: devices that heads and feed-forward widths are sharded over.
        tokens: the new tokens on one device.
        dtype: the name of the activations' dtype.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    if config.head_dim != HEAD_DIM or group > MOST_COLUMNS or config.num_experts_per_tok != 1:
        return f"it takes heads of {HEAD_DIM}, up to {MOST_COLUMNS} a key head, and one expert"
    specs = set(config.attention_specs)
    if any(spec.mask.span is None if spec.rope else spec.qk_norm for spec in specs):
        return (
            "it takes rotary layers with a ring, and NoPE layers without a norm of queries and keys"
        )
    if any(spec.rope and spec.temperature for spec in specs):
        return "it takes no layers with both rotation and temperature"
    if any(cache_kind(spec).page % PAGE_UNIT for spec in specs):
        return f"it takes chunks that are multiples of {PAGE_UNIT} tokens"
    experts = config.num_local_experts
    if experts % 8 or (experts > 32 and experts % 64):  # what TMA cuts the router into
        return f"it takes 8, 16, 24, 32 or a multiple of 64 experts, not {experts}"
    widths, embed = feed_forward_widths(config, tensor), config.hidden_size
    return why_not_few(tokens, dtype, embed, widths) or why_not_norm(embed)


def feed_forward_widths(config: Llama4Config, tensor: int) -> list[int]:
    """A device's share of the widths of experts and of dense layers."""
    return [x // tensor for x in (config.intermediate_size, config.intermediate_size_mlp)]


def _is_matrix(x) -> bool:
    return isinstance(x, QuantizedMatrix)


def decode_layer(
    interpret: Any,
    config: Llama4Config,
    kind: LayerKind,
    p: dict,
    residual: Residual,
    step: Step,
    cache: LayerCache,
) -> tuple[Residual, LayerCache, RouterStats | None]:
    """One decoder layer; each device computes its part of the rows, heads and widths."""
    mesh = meshes.current_mesh()
    if mesh is not None and meshes.axis_size(mesh, "embed") > 1:
        p, _ = lax.optimization_barrier(
            (p, residual)
        )  # or all layers' weights are gathered at once
    held: Any = step.cache  # `why_not_fused` asks for a cache
    real = step.tokens.own.segment.reshape(-1, 1) != 0
    body = functools.partial(_layer, config, kind, interpret)
    of_tokens = (step.tokens.own, step.rope, step.temperature)
    arguments = (p, residual, *of_tokens, held.pool.coords, held.table, held.index, cache)
    if mesh is None:
        residual, cache, routing = body(*arguments)
    else:
        rows = held.pool.table.shape[1]
        run = meshes.per_device(body, *_specs(config, kind, mesh, rows, arguments))
        residual, cache, routing = run(*arguments)
    if routing is None:
        return residual, cache, None
    routing, reached = routing
    return residual, cache, router_stats(routing, real, jnp.sum(reached))


def _specs(config: Llama4Config, kind: LayerKind, mesh, rows: int, arguments) -> tuple:
    """PartitionSpecs of the arguments and results of `_layer`; `rows` are the cache's."""
    p, *_, cache = arguments
    sharded = cache_kind(config.attention_spec(kind)).sharded
    row_spec = meshes.sharded_spec(mesh, row_axes(mesh, rows))
    pool = pool_spec(mesh, rows, sharded)
    cache_spec = jax.tree.map(functools.partial(keys_spec, mesh, rows, sharded), cache)
    specs = layer_specs(config, kind)
    p_spec = map_arrays(lambda w, axes: meshes.param_spec_at_use(axes), specs, p)
    in_specs = (p_spec, *(row_spec,) * 4, pool.coords, pool.table, pool.table, cache_spec)
    return in_specs, (row_spec, cache_spec, row_spec)


def _layer(
    config, kind, interpret, p, residual, own: Coords, rope, temperature, where, table, index, cache
):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with its sum left to the next."""
    eps, run = config.rms_norm_eps, {"interpret": interpret}
    x = residual.x.reshape(-1, residual.x.shape[-1])
    x, normed = add_rms_norm(x, residual.more, p["attention_norm"], eps, **run)
    plan = _head_plan(rope, temperature, index)
    pages = where, table[0]
    out, cache = _attention(config, kind, run, p["attention"], normed, own, plan, pages, cache)
    x, normed = add_rms_norm(x, out, p["feed_forward_norm"], eps, **run)
    if kind.feed_forward == "moe":
        real = own.segment.reshape(-1, 1) != 0
        out, routing = _moe(config, run, p["feed_forward"], normed, real)
    else:
        out, routing = _dense(run, p["feed_forward"], normed), None
    return Residual(x.reshape(residual.x.shape), out), cache, routing


def _head_plan(rope, temperature, index) -> HeadPlan:
    """The tokens' rotation or temperature, and where they go in the cache."""
    cos = sin = None
    if rope is not None:
        flat = (x.reshape(-1, x.shape[-1]) for x in rope)
        cos, sin = (pad_axis(jnp.repeat(x, 2, axis=-1), 0, MAX_TOKENS) for x in flat)
    if temperature is not None:
        temperature = pad_axis(temperature.reshape(-1), 0, MAX_TOKENS)
    return HeadPlan(cos, sin, temperature, index.reshape(-1))


def _attention(config, kind, run, p, x, own: Coords, plan: HeadPlan, pages, cache):
    """The output projection's sum over devices, float32, and the cache with the new tokens."""
    spec = config.attention_spec(kind)
    d = config.head_dim
    heads = math.prod(p["q"].shape[1:]) // d
    o = p["o"] if _is_matrix(p["o"]) else p["o"].reshape(heads * d, -1)
    qkv = matmul_few(x, tuple(p[name] for name in "qkv"), parts=None, **run)
    norm_eps = config.rms_norm_eps if spec.qk_norm else None
    q, *cache = write_heads(qkv, plan, *cache, heads=heads, norm_eps=norm_eps, **run)
    cache = LayerCache(*cache)
    lines = own.segment.shape
    out, lse = decode_attention(
        jnp.swapaxes(q.reshape(*lines, heads, d), 1, 2),
        *cache,
        own,
        pages[0],
        table=pages[1],
        scale=d**-0.5,
        mask=spec.mask,
        return_lse=True,
        **run,
    )
    if cache_kind(spec).sharded:
        out = merge_over_devices(out, lse)
    out = jnp.swapaxes(out, 1, 2).reshape(q.shape)
    out = matmul_few(out, (o,), **run)[0]
    return _sum_over(out, "heads"), cache


def _moe(config: Llama4Config, run, p, x, real):
    """The experts' output summed over devices, float32; the routing and the tokens served."""
    E, here = config.num_local_experts, p["experts"]["down"].shape[0]
    logits = jnp.sum(matmul_few(x, (p["router"],), parts=None, **run), axis=0)
    if why_not_tpu(**run) is not None:  # on TPUs one number takes more operations than a vector
        logits = logits[: len(x)]
    real = jnp.pad(real, ((0, len(logits) - len(real)), (0, 0)))
    routing = choose_experts(config, logits.astype(x.dtype)[:, None], real)
    first = lax.axis_index(meshes.RULES["expert"]) * here if here < E else 0
    expert = routing.expert[:, 0, 0] - first
    busy = busy_experts(expert, here, first == 0)
    routed, shared = p["experts"], p["shared"]
    of_routed, of_shared = ((kind["gate"], kind["up"]) for kind in (routed, shared))
    hidden = experts_gate_up(
        x, of_routed, of_shared, expert, routing.router_weight[:, 0, 0], busy, **run
    )
    out = experts_down(hidden, routed["down"], shared["down"], expert, busy, **run)
    reached = ((expert >= 0) & (expert < here)).astype(jnp.int32)[: len(x), None]
    routing = jax.tree.map(lambda leaf: leaf[: len(x)], routing)
    return _sum_over(out, "expert", "ffn"), (routing, _sum_over(reached, "expert"))


def _dense(run, p, x):
    """A dense layer, as a shared expert without routed ones."""
    no_expert = jnp.full(len(x), -1, jnp.int32)
    busy, weight = jnp.zeros(1, jnp.int32), jnp.ones(len(x))
    hidden = experts_gate_up(x, None, (p["gate"], p["up"]), no_expert, weight, busy, **run)
    return _sum_over(experts_down(hidden, None, p["down"], no_expert, busy, **run), "ffn")


def _sum_over(x: jax.Array, *logical: str) -> jax.Array:
    """One all-reduce over the devices that the logical axes are sharded over."""
    axes = tuple(axis for name in logical for axis in meshes.sharded_axes(name))
    return lax.psum(x, axes) if axes else x
