"""Llama 4 attention: chunked rotary (local) and NoPE with temperature (global), cached or not.

Shape letters: B rows, S new tokens, D embed, H query heads, K key/value heads, d head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmoe import mesh as meshes
from jaxmoe.config import AttentionSpec, LayerKind, Llama4Config
from jaxmoe.model.kernels import FASTEST, AttentionOptions, Kernels
from jaxmoe.model.kv_cache import (
    Cache,
    CacheKind,
    CacheStep,
    LayerCache,
    cache_kind,
    keys_spec,
    plan_writes,
    row_axes,
    step_spec,
)
from jaxmoe.model.layers import linear, rms_normalize, rope_angles, rotate, temperature
from jaxmoe.model.packing import PackedRows, Packing
from jaxmoe.model.sequence import NewTokens, gather, needs_gather
from pallas_kernels.attention import Coords, flash_attention, keep_apart


class Step(NamedTuple):
    """What all layers of one attention share in a call of the model.

    Attributes:
        tokens: coordinates of the new tokens.
        rope: cosine and sine of each token's rotation; None without rotary positions.
        temperature: what each token's queries are multiplied by; None for nothing.
        cache: where the new tokens go in the layers' kind of cache.
    """

    tokens: NewTokens
    rope: tuple[Float[Array, "B S half"], Float[Array, "B S half"]] | None
    temperature: Float[Array, "B S"] | None
    cache: CacheStep | None


def start_step(
    config: Llama4Config, coords: Coords, cache: Cache | None, packing: Packing | None = None
) -> tuple[dict[AttentionSpec, Step], Cache | None]:
    """Everything that depends on positions, computed once a call for each kind of attention.

    Args:
        packing: as for `forward`.

    Returns:
        The step of each attention, and the cache with all but its keys updated.
    """
    writes: dict[CacheKind, CacheStep] = {}
    if cache is not None:
        writes, cache = plan_writes(config, cache, coords, packing)

    whole = Coords(*(meshes.constrain(x, "batch", None) for x in coords))
    rows = None if packing is None or packing.single is None else (packing.row, packing.single)
    rows = None if rows is None else PackedRows(*rows)

    def step(spec: AttentionSpec) -> Step:
        needed = (
            None
            if packing is not None
            else needs_gather(spec.mask, whole, cached=cache is not None)
        )
        return Step(
            NewTokens(coords, whole, needed, rows, rows),
            rope_angles(config, spec.mask, coords.position) if spec.rope else None,
            temperature(config, coords.position) if spec.temperature else None,
            writes.get(cache_kind(spec)),
        )

    return {spec: step(spec) for spec in dict.fromkeys(config.attention_specs)}, cache


def attention(
    config: Llama4Config,
    kind: LayerKind,
    p: dict,
    x: Float[Array, "B S D"],
    step: Step,
    cache: LayerCache | None,
    kernels: Kernels = FASTEST,
) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    """One attention block, without its norm and residual."""
    q = linear("BSD,DHd->BSHd", x, p["q"], config.head_dim)
    k = linear("BSD,DKd->BSKd", x, p["k"], config.head_dim)
    v = linear("BSD,DKd->BSKd", x, p["v"], config.head_dim)
    spec = config.attention_spec(kind)
    if step.rope is not None:
        q, k = rotate(q, *step.rope), rotate(k, *step.rope)
    if spec.qk_norm:
        q, k = (rms_normalize(z, config.rms_norm_eps) for z in (q, k))
    if step.temperature is not None:
        q = (q.astype(jnp.float32) * step.temperature[..., None, None]).astype(x.dtype)
    q, k, v = (jnp.swapaxes(z, 1, 2) for z in (q, k, v))
    if step.tokens.all_rows is not None:
        k, v = keep_apart(k, v)
    options = AttentionOptions(
        config.head_dim**-0.5, spec.mask, kernels.attention, kernels.interpret
    )
    out, cache = attend(spec, options, q, k, v, step, cache)
    return linear("BHSd,HdD->BSD", out, p["o"]), cache


def attend(
    spec: AttentionSpec,
    options: AttentionOptions,
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    step: Step,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B H S d"], LayerCache | None]:
    """Attention of the new tokens to themselves and to the cache, on any mesh."""
    axes = token_axes(q)
    if cache is None or step.cache is None:
        body = functools.partial(attend_uncached, options, axes)
        in_specs, q_spec = _token_specs(q, k, v, step.tokens, len(q))
        return meshes.per_device(body, in_specs, q_spec)(q, k, v, step.tokens), None
    kind, rows = cache_kind(spec), step.cache.pool.table.shape[1]
    body = functools.partial(kind.attend, options, axes)
    in_specs, q_spec = _token_specs(q, k, v, step.tokens, rows)
    cache_specs, step_specs = _cache_specs(kind, rows, cache, step.cache)
    run = meshes.per_device(body, (*in_specs, cache_specs, step_specs), (q_spec, cache_specs))
    return run(q, k, v, step.tokens, cache, step.cache)


def attend_uncached(
    options: AttentionOptions,
    axes: tuple[str, ...],
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    tokens: NewTokens,
) -> Any:
    """Attention [B, H, S, d] of the new tokens to themselves, on each device.

    Args:
        axes: the mesh axes that tokens are sharded over: keys are gathered where they are needed.
    """
    k, v = gather((k, v), axes, tokens.needs_gather)
    in_order = not axes
    shared = options.of_new_tokens()
    return flash_attention(q, k, v, tokens.own, tokens.all, in_order=in_order, **shared)


def token_axes(q: jax.Array) -> tuple[str, ...]:
    """The mesh axes that the tokens of q [B, H, S, d] are sharded over."""
    mesh = meshes.current_mesh()
    return () if mesh is None else meshes.activation_axes(mesh, "length", q.shape[2])


def _token_specs(q, k, v, tokens: NewTokens, rows: int) -> tuple[Any, Any]:
    """Where (q, k, v, tokens) lie, and where q lies.

    Args:
        rows: of the cache, whose groups lines of new tokens lie with; without one, of q.
    """
    mesh = meshes.current_mesh()
    if mesh is None:
        return (None,) * 4, None
    batch = row_axes(mesh, rows)

    def specs(tree, *axes):
        def spec(x):
            sizes = zip(axes, x.shape[1:], strict=True)
            return meshes.sharded_spec(
                mesh, batch, *(meshes.activation_axes(mesh, *pair) for pair in sizes)
            )

        return jax.tree.map(spec, tree)

    q_spec = specs(q, "heads", "length", None)
    kv_specs = specs((k, v), "kv_heads", "length", None)
    own, own_rows = specs((tokens.own, tokens.own_rows), "length")
    whole, all_rows = specs((tokens.all, tokens.all_rows), None)
    needed: Any = None if tokens.needs_gather is None else PartitionSpec()
    return (q_spec, *kv_specs, NewTokens(own, whole, needed, own_rows, all_rows)), q_spec


def _cache_specs(kind: CacheKind, rows: int, cache: LayerCache, step: CacheStep) -> tuple[Any, Any]:
    """Where a layer's cache and its `CacheStep` lie."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return None, None
    keys = jax.tree.map(functools.partial(keys_spec, mesh, rows, kind.sharded), cache)
    return keys, step_spec(mesh, rows, kind.sharded, step)
