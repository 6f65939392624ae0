"""An EAGLE-3 head: one decoder layer that guesses what its target says next (arXiv 2503.01840).

    hidden = fuse_states(config, params, states)          # of the target, `forward(states=...)`
    out = eagle_pass(config, params, embedded, hidden, positions, segment_ids, cache)
    logits = draft_logits(config, params, out.hidden)

The pass at a token's place t takes the embedding of the token after it, t + 1, which is known, and
the hidden state at t, and guesses the token t + 2. Where the target has read t, the hidden state is
made of three of the target's; after that it is what the head itself put out at t - 1.

Shape letters: B rows, S tokens a row, D embed, H query heads, K key/value heads, d head size,
n pages of a row, t places of a page, G tokens that can be guessed (the draft vocabulary).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.eagle_config import STATES, EagleConfig
from jaxmoe.model.attention import token_axes
from jaxmoe.model.kernels import AttentionOptions
from jaxmoe.model.kv_cache.layer import LayerCache, attend_rows
from jaxmoe.model.kv_cache.layout import PAGE
from jaxmoe.model.layers import linear, product, rms_norm, rope_frequencies, swiglu
from jaxmoe.model.param_spec import ParamSpec, SpecTree, is_spec
from jaxmoe.model.params import map_arrays, swiglu_specs
from jaxmoe.model.sequence import NewTokens, gather
from pallas_kernels.attention import CAUSAL, Coords, flash_attention

_CACHE = (None, None, "kv_heads", None, None)  # the logical axes of keys and values


class DraftCache(NamedTuple):
    """Keys and values of a head in pages, one sequence a row; position p has the place p.

    Devices that divide the batch have all rows, so that any rows can be gone on with.
    """

    k: Float[Array, "B n K t d"]
    v: Float[Array, "B n K t d"]

    @property
    def pool(self) -> LayerCache:
        """The pages of all rows, one row's after the other's."""
        return LayerCache(*(x.reshape(-1, *x.shape[2:]) for x in self))

    @property
    def places(self) -> int:
        """Tokens of a row, at most."""
        return self.k.shape[1] * self.k.shape[3]


class PassOutput(NamedTuple):
    """What a pass of the head returns."""

    hidden: Float[Array, "B S D"]  # before the norm: what the next pass takes
    cache: DraftCache | None


class Heads(NamedTuple):
    """What attention of a pass is between: rotated queries and keys, and values."""

    q: Float[Array, "B H S d"]
    k: Float[Array, "B K S d"]
    v: Float[Array, "B K S d"]


def eagle_specs(config: EagleConfig) -> SpecTree:
    """The parameters of a head. Its embeddings are its target's."""
    D, d = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    norm = ParamSpec((D,), (None,), None)
    return {
        "fc": ParamSpec((STATES * D, D), ("embed", None), (0,)),
        "embed_norm": norm,
        "hidden_norm": norm,
        "attention": {
            "q": ParamSpec((2 * D, H, d), ("embed", "heads", None), (0,)),
            "k": ParamSpec((2 * D, K, d), ("embed", "kv_heads", None), (0,)),
            "v": ParamSpec((2 * D, K, d), ("embed", "kv_heads", None), (0,)),
            "o": ParamSpec((H, d, D), ("heads", None, "embed"), (0, 1)),
        },
        "feed_forward_norm": norm,
        "feed_forward": swiglu_specs(D, config.intermediate_size),
        "norm": norm,
        "lm_head": ParamSpec((D, config.draft_vocab_size), ("embed", "vocab"), (0,)),
    }


def init_eagle(config: EagleConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict:
    """Random parameters: a tree of arrays like `eagle_specs`."""
    leaves, structure = jax.tree.flatten(eagle_specs(config), is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([spec.init(k, dtype) for spec, k in zip(leaves, keys, strict=True)])


def abstract_eagle(config: EagleConfig, mesh: Any, dtype: Any) -> dict:
    """Shapes, dtypes and shardings of a head's parameters on a mesh, or an abstract mesh.

    Raises:
        UserError: if the mesh does not divide one.
    """

    def laid_out(path: tuple, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        name = "head." + ".".join(key.key for key in path)
        meshes.check_divides(name, spec.shape, spec.axes, mesh)
        layout = meshes.sharding(mesh, meshes.param_spec(spec.axes))
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=layout)

    return jax.tree.map_with_path(laid_out, eagle_specs(config), is_leaf=is_spec)


def init_draft_cache(config: EagleConfig, rows: int, places: int, dtype: Any) -> DraftCache:
    """A cache of zeros for sequences of `places` tokens, or a few more, which fill a page."""
    shape = _cache_shape(config, rows, places)
    return DraftCache(*(meshes.constrain(jnp.zeros(shape, dtype), *_CACHE) for _ in range(2)))


def abstract_draft_cache(
    config: EagleConfig, rows: int, places: int, dtype: Any, mesh: Any
) -> DraftCache:
    """Shapes, dtypes and shardings of `init_draft_cache` on a mesh, or an abstract mesh."""
    shape = _cache_shape(config, rows, places)
    layout = meshes.sharding(mesh, meshes.activation_spec(mesh, _CACHE, shape))
    like: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    return DraftCache(like, like)


def _cache_shape(config: EagleConfig, rows: int, places: int) -> tuple[int, ...]:
    return rows, -(-places // PAGE), config.num_key_value_heads, PAGE, config.head_dim


def at_use(config: EagleConfig, params: dict) -> dict:
    """The parameters gathered over `fsdp`, as a pass needs them."""
    return map_arrays(meshes.constrain_param, eagle_specs(config), params)


def fuse_states(
    config: EagleConfig, params: dict, states: Float[Array, "B S states"]
) -> Float[Array, "B S D"]:
    """The hidden state that a pass begins with, of the target's three side by side."""
    fc = meshes.constrain_param(params["fc"], eagle_specs(config)["fc"].axes)
    hidden = linear("BSE,ED->BSD", states.astype(fc.dtype), fc)
    return meshes.constrain(hidden, "batch", "length", None)


def eagle_pass(
    config: EagleConfig,
    params: dict,
    embedded: Float[Array, "B S D"],
    hidden: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    cache: DraftCache | None = None,
    rows: Int[Array, "B"] | None = None,
) -> PassOutput:
    """One pass of the head at new places, after those that `cache` holds.

    Args:
        params: a tree like `eagle_specs(config)`.
        embedded: the target's embedding of the token after each place.
        hidden: of `fuse_states`, or of the pass at the place before.
        positions: of each place within its sequence, from 0.
        segment_ids: which sequence a place belongs to; 0 is padding. With a cache, all that are
            not 0 belong to the sequence of the row.
        cache: of one sequence a row. New keys replace those of the same positions; earlier
            positions are there, and later ones are not seen; a position beyond the cache's places
            leaves nothing in it.
        rows: the cache's row of each sequence; default: the first is the first's, and so on.
    """
    params = at_use(config, params)
    x, residual = pass_input(config, params, embedded, hidden)
    q, k, v = heads(config, params, x, positions)
    coords = Coords(positions, segment_ids)
    if cache is None:
        out, _ = attend(config, q, k, v, coords)
    else:
        rows = jnp.arange(len(q)) if rows is None else rows
        cache = _written(cache, k, v, coords, rows)
        whole = Coords(positions, jnp.minimum(segment_ids, 1))
        out = _attend_to_cache(config, q, cache, whole, rows)
    return PassOutput(pass_output(config, params, residual, out), cache)


def pass_input(
    config: EagleConfig, params: dict, embedded: Float[Array, "B S D"], hidden
) -> tuple[Float[Array, "B S inputs"], Float[Array, "B S D"]]:
    """What attention takes, norm(embedded) beside norm(hidden) [B, S, 2 D], and the residual."""
    normed = rms_norm(hidden, params["hidden_norm"], config.rms_norm_eps)
    embedded = rms_norm(embedded.astype(hidden.dtype), params["embed_norm"], config.rms_norm_eps)
    residual = normed if config.norm_before_residual else hidden
    return jnp.concatenate([embedded, normed], axis=-1), residual


def heads(config: EagleConfig, params: dict, x: Float[Array, "B S inputs"], positions) -> Heads:
    """Queries, keys and values of places, rotated by their positions [B, S]."""
    p = params["attention"]
    q = linear("BSD,DHd->BSHd", x, p["q"])
    k = linear("BSD,DKd->BSKd", x, p["k"])
    v = linear("BSD,DKd->BSKd", x, p["v"])
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency
    q, k = (rotate_halves(z, jnp.cos(angle), jnp.sin(angle)) for z in (q, k))
    return Heads(*(jnp.swapaxes(z, 1, 2) for z in (q, k, v)))


def rotate_halves(
    x: Float[Array, "B S H d"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S H d"]:
    """Rotates the pairs (0, d/2), (1, d/2 + 1), ... of each head, in float32, as Llama 3 does."""
    half = x.shape[-1] // 2
    one, two = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x.dtype)


def _written(cache: DraftCache, k, v, coords: Coords, rows: Int[Array, "B"]) -> DraftCache:
    """The cache with new keys and values [B, K, S, d] at their positions; padding has none."""
    real = (coords.segment != 0) & (coords.position < cache.places)
    slot = rows[:, None] * cache.places + coords.position
    pool = cache.pool.write(k, v, jnp.where(real, slot, len(cache.k) * cache.places))

    def in_rows(pages):
        return meshes.constrain(pages.reshape(cache.k.shape), *_CACHE)

    return DraftCache(*map(in_rows, pool))


def _attend_to_cache(
    config: EagleConfig,
    q: Float[Array, "B H S d"],
    cache: DraftCache,
    coords: Coords,
    rows: Int[Array, "B"],
) -> Float[Array, "B H S d"]:
    """Causal attention in float32 to the rows' keys up to each query, and to no page beyond."""
    pool, pages = cache.pool, cache.k.shape[1]
    table = rows[:, None] * pages + jnp.arange(pages)
    size = len(cache.k) * pages, PAGE
    page, within = (lax.broadcasted_iota(coords.position.dtype, size, axis) for axis in (0, 1))
    place = page % pages * PAGE + within
    run = functools.partial(attend_rows, AttentionOptions(config.head_dim**-0.5, CAUSAL))
    arguments = q, pool, coords, Coords(place, jnp.ones_like(place)), table
    specs, outputs = None, None
    if (mesh := meshes.current_mesh()) is not None:
        spec = functools.partial(meshes.activation_spec, mesh)
        whole: Any = PartitionSpec()
        of_q = spec(("batch", "heads", None, None), q.shape)
        of_keys: Any = spec((None, "kv_heads", None, None), pool.k.shape)
        own: Any = spec(("batch", None), table.shape)
        specs = of_q, LayerCache(of_keys, of_keys), Coords(own, own), Coords(whole, whole), own
        outputs = of_q, spec(("batch", "heads", None), q.shape[:3])
    out, _ = meshes.per_device(run, specs, outputs)(*arguments)
    return out


def attend(
    config: EagleConfig,
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    coords: Coords,
) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """Causal attention of tokens in float32, and the log-sum-exp of its scores, on any mesh."""
    axes = token_axes(q)

    def body(q, k, v, tokens: NewTokens):
        k, v = gather((k, v), axes)
        return flash_attention(
            q, k, v, tokens.own, tokens.all, scale=config.head_dim**-0.5, return_lse=True
        )

    specs, outputs = None, None
    if (mesh := meshes.current_mesh()) is not None:
        spec = functools.partial(meshes.activation_spec, mesh)
        of_q = spec(("batch", "heads", "length", None), q.shape)
        of_keys = spec(("batch", "kv_heads", "length", None), k.shape)
        own: Any = spec(("batch", "length"), coords.position.shape)
        whole: Any = spec(("batch", None), coords.position.shape)
        of_tokens = NewTokens(Coords(own, own), Coords(whole, whole), None)
        specs = of_q, of_keys, of_keys, of_tokens
        outputs = of_q, spec(("batch", "heads", "length"), q.shape[:3])
    tokens = NewTokens(coords, coords, None)
    return meshes.per_device(body, specs, outputs)(q, k, v, tokens)


def pass_output(
    config: EagleConfig, params: dict, residual: Float[Array, "B S D"], out
) -> Float[Array, "B S D"]:
    """What a pass puts out, of attention's output [B, H, S, d]: before the last norm."""
    attended = linear("BHSd,HdD->BSD", out.astype(residual.dtype), params["attention"]["o"])
    hidden = meshes.constrain(residual + attended, "batch", "length", None)
    normed = rms_norm(hidden, params["feed_forward_norm"], config.rms_norm_eps)
    hidden = hidden + swiglu(params["feed_forward"], normed)
    return meshes.constrain(hidden, "batch", "length", None)


def draft_logits(
    config: EagleConfig, params: dict, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch G"]:
    """Logits of the draft vocabulary in float32, never rounded, of what a pass put out."""
    normed = rms_norm(hidden, params["norm"], config.rms_norm_eps)
    head = meshes.constrain_param(params["lm_head"], ("embed", "vocab"))
    return product("...D,DG->...G", normed, head)
