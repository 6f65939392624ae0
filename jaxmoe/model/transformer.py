"""The Llama 4 decoder, top to bottom.

    out = forward(config, params, tokens, positions, segment_ids, cache)
    logits = unembed(config, params, out.hidden)

Pure functions of arrays; `Llama4` owns the parameters as an NNX module. Shape letters: B rows,
S tokens a row, D embed, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.mesh import constrain, constrain_param
from jaxmoe.model.attention import Step, attention, start_step
from jaxmoe.model.decode_step import (
    Residual,
    decode_layer,
    final_norm,
    residual_stream,
    why_not_fused,
)
from jaxmoe.model.embedding import embed, unembed, with_features
from jaxmoe.model.kernels import FASTEST, Kernels
from jaxmoe.model.kv_cache import Cache, LayerCache
from jaxmoe.model.layers import rms_norm, swiglu
from jaxmoe.model.moe import RouterStats
from jaxmoe.model.moe import moe as llama4_moe
from jaxmoe.model.packing import Packing
from jaxmoe.model.params import init_params, layer_specs, map_arrays
from jaxmoe.model.remat import Remat, with_remat
from pallas_kernels.attention import Coords


class Output(NamedTuple):
    """What `forward` returns."""

    hidden: Float[Array, "B S D"]  # after the final norm; `unembed` makes logits of it
    cache: Cache | None
    router_stats: tuple[RouterStats, ...]  # one a MoE layer, first to last
    states: Float[Array, "B S states"] | None = None  # those asked for, side by side


def forward(
    config: Llama4Config,
    params: dict,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    cache: Cache | None = None,
    *,
    remat: Remat = False,
    fused: bool = True,
    kernels: Kernels = FASTEST,
    moe: Callable | None = None,
    packing: Packing | None = None,
    features: Float[Array, "N D"] | None = None,
    states: tuple[int, ...] = (),
) -> Output:
    """Runs the decoder on new tokens, after those that `cache` holds.

    Args:
        params: a tree like `param_specs(config)`.
        positions: of each token within its own sequence, from 0.
        segment_ids: which sequence a token belongs to; 0 is padding, anywhere in the row. Tokens
            see only their own segment. A segment is contiguous and may continue in the next call.
        cache: None for a whole forward pass; otherwise a cache with room for the new tokens.
        remat: what the backward pass computes again instead of keeping it: nothing, each layer
            (`full` or True), or a part of each, as `jaxmoe.model.remat.with_remat` says.
        fused: run a step of one new token a row by the kernels of `decode_step` where they serve.
        kernels: the implementations to run on; naming any turns `fused` off.
        moe: a mixture of experts of the same arguments as `jaxmoe.model.moe.moe`; default: that
            one. Giving one turns `fused` off.
        packing: which rows of the cache the tokens belong to, where its rows are not theirs.
        features: of images, as `vision.tile_features` makes them; `features[i]` stands in place of
            the embedding of the token `vocab_size + i`.
        states: layers before which the residual stream is returned too, as a draft head reads it;
            the number of layers stands for what is after the last.
    """
    steps, cache = start_step(config, Coords(positions, segment_ids), cache, packing)
    entries = cache.layers if cache is not None else [None] * len(config.layers)
    x = embed(params["embed"], tokens)
    if features is not None:
        x = with_features(config, x, tokens, features)
    length = "length" if remat in (False, "none") else "residual"
    x = constrain(x, "batch", length, None)
    parts = {"kernels": kernels, "moe": llama4_moe if moe is None else moe, "length": length}
    layer = functools.partial(decoder_layer, **parts)
    run_layer: Callable = with_remat(layer, remat, (0, 1)) or functools.partial(_jit_layer, **parts)
    interpret = kernels.interpret
    fused = fused and moe is None and kernels.fastest
    fused = fused and why_not_fused(config, params, x, cache, interpret, packing) is None
    rows = 0 if cache is None else len(cache.length)
    carried: Any = x
    if fused:
        carried, run_layer = Residual(x, None), functools.partial(_jit_decode_layer, interpret)
    new_entries, router_stats, streams = [], [], {0: x}
    layers = zip(config.layers, config.attention_specs, params["layers"], strict=True)
    for i, (kind, spec, p) in enumerate(layers):
        with jax.named_scope(f"layer_{i}"):  # in the compiled program; jaxmoe.plan.operations reads
            carried, entry, stats = run_layer(config, kind, p, carried, steps[spec], entries[i])
        new_entries.append(entry)
        if i + 1 in states:
            streams[i + 1] = residual_stream(carried, rows) if fused else carried
        router_stats += [stats] if stats is not None else []
    if cache is not None:
        cache = cache._replace(layers=tuple(new_entries))
    if fused:
        hidden = final_norm(config, interpret, params["norm"], carried, rows)
    else:
        hidden = rms_norm(carried, params["norm"], config.rms_norm_eps)
    asked = jnp.concatenate([streams[i] for i in states], axis=-1) if states else None
    return Output(hidden, cache, tuple(router_stats), asked)


def decoder_layer(
    config: Llama4Config,
    kind: LayerKind,
    p: dict,
    x: Float[Array, "B S D"],
    step: Step,
    cache: LayerCache | None,
    *,
    kernels: Kernels = FASTEST,
    moe: Callable = llama4_moe,
    length: str = "length",
) -> tuple[Float[Array, "B S D"], LayerCache | None, RouterStats | None]:
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        length: the logical axis of tokens in what is added up. `residual` spreads them over
            `tensor` too, so that devices which share a layer's matrices do not each keep all of
            its input for the backward pass (Korthikanti et al. 2022, section 4.2.2).
    """
    p, x = jax.lax.optimization_barrier((p, x))  # else XLA gathers all layers' weights at once
    p = map_arrays(constrain_param, layer_specs(config, kind), p)
    normed = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
    out, cache = attention(config, kind, p["attention"], normed, step, cache, kernels)
    x = constrain(x + out, "batch", length, None)
    normed = rms_norm(x, p["feed_forward_norm"], config.rms_norm_eps)
    if kind.feed_forward == "moe":
        out, stats = moe(config, p["feed_forward"], normed, step.tokens.own.segment != 0, kernels)
    else:
        out, stats = swiglu(p["feed_forward"], normed), None
    return constrain(x + out, "batch", length, None), cache, stats


# Layers of one kind are traced once and called many times.
_jit_layer = jax.jit(
    decoder_layer, static_argnums=(0, 1), static_argnames=("kernels", "moe", "length")
)
_jit_decode_layer = jax.jit(decode_layer, static_argnums=(0, 1, 2))


def positions_of(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """How many earlier tokens of its row each token's segment has; 0 on padding."""
    order = jnp.argsort(segment_ids, axis=1, stable=True)
    grouped = jnp.take_along_axis(segment_ids, order, axis=1)
    index = jnp.broadcast_to(jnp.arange(grouped.shape[1]), grouped.shape)
    starts = jnp.pad(grouped[:, 1:] != grouped[:, :-1], ((0, 0), (1, 0)))
    rank = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    positions = jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)
    return jnp.where(segment_ids == 0, 0, positions)


class Llama4(nnx.Module):
    """Owns the parameters; `nnx.split` or `model.params()` hands them to the pure functions."""

    def __init__(self, config: Llama4Config, params: dict):
        self.config = config
        self.tree = nnx.data(jax.tree.map(nnx.Param, params))

    @classmethod
    def init(cls, config: Llama4Config, rngs: nnx.Rngs, dtype=jnp.float32) -> "Llama4":
        """A model with random parameters."""
        return cls(config, init_params(config, rngs.params(), dtype))

    def params(self) -> dict:
        """The plain tree of arrays, as `forward` takes it."""
        return jax.tree.map(lambda p: p[...], self.tree, is_leaf=lambda x: isinstance(x, nnx.Param))

    def __call__(self, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]):
        """Float32 logits [B, S, V] of a whole forward pass."""
        params = self.params()
        out = forward(self.config, params, tokens, positions_of(segment_ids), segment_ids)
        return unembed(self.config, params, out.hidden)
