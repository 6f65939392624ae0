"""Llama 4's vision tower, top to bottom: the pixels of tiles to the features of their tokens.

    features = tile_features(config, params["vision"], pixels)
    hidden, ... = forward(config, params, tokens, ..., features=features)

A tile is cut into patches, which a bidirectional transformer with rotary positions in two
dimensions turns into vectors. Squares of them become one vector each (pixel shuffle), an adapter
and a projector bring these to the text model's width. Tiles do not see each other: on a mesh every
device has some, and gathers the weights block by block. Where there are too few tiles for that, the
devices along `tensor` share the heads and the feed-forward width, as in the text model.

Shape letters: N tiles, P patches of a tile, S = P + 1 with the class token, D tower width, H heads,
d head size, T tokens of a tile, E text width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config, VisionConfig, vision_of
from jaxmoe.model.layers import layer_norm, linear, product, rotate
from jaxmoe.model.param_spec import SpecTree
from jaxmoe.model.params import map_arrays
from jaxmoe.model.remat import Remat, with_remat
from jaxmoe.model.vision_params import vision_layer_specs, vision_specs
from pallas_kernels.attention import flash_attention

EPS = 1e-5  # of every LayerNorm; the configs' `norm_eps` is not used by the reference


def tile_features(
    config: Llama4Config,
    p: dict,
    pixels: UInt8[Array, "N side side channels"] | Float[Array, "N side side channels"],
    remat: Remat = False,
) -> Float[Array, "N T E"]:
    """What stands in the text model's sequence for each tile, in the parameters' dtype.

    Args:
        p: the parameters, as `vision_specs` declares them.
        pixels: of tiles: 0 to 255, or floats that are already scaled to -1 to 1.
        remat: as for `forward`, of each block; blocks name no outputs.

    Raises:
        UserError: if the model has no vision tower.
    """
    vision = vision_of(config)
    x = _scaled(pixels, p["projector"].dtype)
    outer = {name: w for name, w in p.items() if name != "layers"}
    p = p | _at_use(_outer_specs(config, vision), outer, len(x))
    x = linear("NPc,cD->NPD", patches(vision, x), p["patch_embedding"])
    last = jnp.broadcast_to(p["class_embedding"].astype(x.dtype), (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([x, last], axis=1) + p["position_embedding"].astype(x.dtype)
    x = _over_tiles(layer_norm(x, p["norm_before"], EPS))
    block = with_remat(tower_block, remat, (0,)) or _jit_block
    for i, layer in enumerate(p["layers"]):
        with jax.named_scope(f"vision_layer_{i}"):
            x = block(vision, layer, x)
    x = layer_norm(x, p["norm_after"], EPS)[:, :-1]
    x = pixel_shuffle(vision, x)
    for matrix in (p["adapter"]["up"], p["adapter"]["down"]):
        x = _gelu(linear("NTD,DF->NTF", x, matrix))
    return linear("NTD,DE->NTE", x, p["projector"])


def _scaled(pixels, dtype) -> Float[Array, "N side side channels"]:
    """Pixels from -1 to 1."""
    if pixels.dtype == jnp.uint8:
        pixels = (pixels.astype(jnp.float32) - 127.5) / 127.5
    return pixels.astype(dtype)


def patches(
    vision: VisionConfig, pixels: Float[Array, "N side side channels"]
) -> Float[Array, "N P c"]:
    """The patches of tiles, row by row, each as a vector: channel, row, column."""
    side, size = vision.patches_a_side, vision.patch_size
    x = pixels.reshape(len(pixels), side, size, side, size, vision.num_channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(len(x), side * side, -1)


def tower_block(vision: VisionConfig, p: dict, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
    """One block: x + attention(norm(x)), then x + feed_forward(norm(x))."""
    p, x = jax.lax.optimization_barrier((p, x))  # else XLA gathers all blocks' weights at once
    p = _at_use(vision_layer_specs(vision), p, len(x))
    x = _over_tiles(x + attention(vision, p["attention"], layer_norm(x, p["attention_norm"], EPS)))
    hidden = _affine(layer_norm(x, p["feed_forward_norm"], EPS), p["feed_forward"]["up"])
    return _over_tiles(x + _affine(_gelu(hidden), p["feed_forward"]["down"]))


_jit_block = jax.jit(tower_block, static_argnums=0)


def attention(vision: VisionConfig, p: dict, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
    """Attention of every patch of a tile, and of its class token, to all of them."""
    heads = (*x.shape[:2], vision.num_attention_heads, vision.head_dim)
    q, k, v = (_affine(x, p[name]).reshape(heads) for name in "qkv")
    cos, sin = (jnp.asarray(angle)[None] for angle in rope_angles(vision))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    run = functools.partial(flash_attention, scale=vision.head_dim**-0.5, causal=False)
    q, k, v = (jnp.swapaxes(z, 1, 2) for z in (q, k, v))
    spec = _heads_spec(q)
    out = meshes.per_device(run, (spec, spec, spec), spec)(q, k, v)
    return _affine(jnp.swapaxes(out, 1, 2).reshape(x.shape), p["o"])


def rope_angles(vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [S, d / 2] of the rotation of each pair of a head's dimensions, float32.

    The first half of the pairs turns with the patch's column, the second with its row, both counted
    from 1; the class token, which is last, is not rotated.
    """
    side, half = vision.patches_a_side, vision.head_dim // 2
    frequency = np.float32(vision.rope_theta) ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    row, column = np.divmod(np.arange(side * side, dtype=np.float32), side)
    turns = [np.outer(column + 1, frequency), np.outer(row + 1, frequency)]
    angle = np.concatenate(turns, axis=1)
    angle = np.pad(angle, ((0, 1), (0, 0))).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def pixel_shuffle(vision: VisionConfig, x: Float[Array, "N P D"]) -> Float[Array, "N T merged"]:
    """Squares of patches as one vector each: the patches of a square row by row, side by side."""
    side, merged = vision.patches_a_side, vision.patches_merged
    squares = x.reshape(len(x), side // merged, merged, side // merged, merged, -1)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), vision.tokens_per_tile, -1)


def _affine(x: Float[Array, "N S i"], p: dict) -> Float[Array, "N S o"]:
    """x @ weight + bias, rounded once."""
    return (product("NSi,io->NSo", x, p["weight"]) + p["bias"]).astype(x.dtype)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def _heads_spec(q: Float[Array, "N H S d"]):
    """Where queries, keys and values lie."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return None
    heads = None if _gathers(len(q)) else "heads"
    return meshes.activation_spec(mesh, ("tiles", heads, None, None), q.shape)


def _gathers(tiles: int) -> bool:
    """Whether devices along `tensor` have tiles of their own, and need whole weights for them."""
    mesh = meshes.current_mesh()
    return mesh is not None and "tensor" in meshes.activation_axes(mesh, "tiles", tiles)


def _at_use(specs: SpecTree, p: dict, tiles: int) -> dict:
    """The parameters as the computation of so many tiles needs them on each device."""

    def gathered(w, axes):
        whole = tuple(None for _ in axes) if _gathers(tiles) else axes
        return meshes.constrain_param(w, whole)

    return map_arrays(gathered, specs, p)


def _outer_specs(config: Llama4Config, vision: VisionConfig) -> SpecTree:
    """The declarations of all that belongs to no block."""
    specs = vision_specs(vision, config.hidden_size)
    return {name: spec for name, spec in specs.items() if name != "layers"}


def _over_tiles(x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
    return meshes.constrain(x, "tiles", None, None)
