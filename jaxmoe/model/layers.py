"""The small pure functions that Llama 4's layers are made of.

Dtype rules (as the reference implementations round): matmuls accumulate in float32 and round to the
model dtype; norms, rotation, temperature and the router's sigmoid are float32 inside.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import Llama4Config, RopeScaling
from jaxmoe.mesh import constrain
from jaxmoe.model.lora import Lora, has_delta, lora_delta
from jaxmoe.model.quantized import quantized_linear
from pallas_kernels.attention import Mask
from pallas_kernels.quantized import QuantizedMatrix

Matrix = Float[Array, "..."] | QuantizedMatrix | Lora


def linear(
    subscripts: str, x: Float[Array, "..."], w: Matrix, head_dim: int | None = None
) -> Float[Array, "..."]:
    """The einsum of `x` and a weight with float32 sums, rounded to the dtype of `x`.

    Args:
        head_dim: of the heads that `w` makes; needed where it is quantized or has an adapter.
    """
    if isinstance(w, QuantizedMatrix):
        return quantized_linear(subscripts, x, w, head_dim)
    return product(subscripts, x, w, head_dim).astype(x.dtype)


def product(
    subscripts: str, x: Float[Array, "..."], w: Matrix, head_dim: int | None = None
) -> Float[Array, "..."]:
    """What `linear` rounds, in float32; of a quantized matrix it is rounded already."""
    if isinstance(w, Lora):
        base = product(subscripts, x, w.base, head_dim)
        return base + lora_delta(subscripts, x, w, head_dim) if has_delta(w) else base
    if isinstance(w, QuantizedMatrix):
        return quantized_linear(subscripts, x, w, head_dim).astype(jnp.float32)
    return jnp.einsum(
        subscripts, x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def rms_normalize(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, rounded to x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "... D"]:
    """RMSNorm; the normalized value is rounded before the weight multiplies it."""
    return (rms_normalize(x, eps) * weight).astype(x.dtype)


def layer_norm(x: Float[Array, "... D"], p: dict, eps: float) -> Float[Array, "... D"]:
    """LayerNorm (arXiv 1607.06450), in float32, rounded once after the weight and the bias."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, -1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + eps)
    return (normalized * p["weight"] + p["bias"]).astype(x.dtype)


def swiglu(p: dict, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The SwiGLU feed-forward layer down(silu(gate(x)) * up(x))."""
    hidden = jax.nn.silu(linear("BSD,DF->BSF", x, p["gate"])) * linear("BSD,DF->BSF", x, p["up"])
    # Else XLA's partitioner aborts where tokens are spread over `sequence` and, between recomputed
    # layers, over `tensor` (jax 0.11.2): it splits this product along both.
    hidden = constrain(hidden, "batch", "length", "ffn")
    return linear("BSF,FD->BSD", hidden, p["down"])


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, "half"]:
    """The angle in radians, a position, of each pair of a head's dimensions, float32.

    `theta ** (-2m / head_dim)`, and with `llama3` scaling divided by `factor` where the wavelength
    exceeds `original / low`, unchanged below `original / high`, and a ramp between the two, which
    is empty when they are equal.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.float32(theta) ** exponent
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low == high:
        keep = (turns >= low).astype(jnp.float32)
    else:
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * keep + frequency / scaling.factor * (1 - keep)


def rope_angles(
    config: Llama4Config, mask: Mask, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of the rotation of each token and pair of dimensions.

    Rotation is relative. So where a mask keeps chunks from each other, positions within the chunk
    give the same attention as positions in the sequence, and float32 stays exact at ten million
    tokens.

    Args:
        mask: of the layers whose queries and keys are rotated.
    """
    if mask.span is not None and mask.block_diagonal:
        positions = positions - mask.first(positions)
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B S H d"], cos: Float[Array, "#B S half"], sin: Float[Array, "#B S half"]
) -> Float[Array, "B S H d"]:
    """Rotates the pairs (0, 1), (2, 3), ... of each head, in float32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def temperature(config: Llama4Config, positions: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """The scale of global layers' queries: 1 + attn_scale * ln(floor((p+1) / floor_scale) + 1)."""
    if not config.attn_temperature_tuning:
        return jnp.ones(positions.shape, jnp.float32)
    steps = (positions + 1) // config.floor_scale
    return 1.0 + config.attn_scale * jnp.log1p(steps.astype(jnp.float32))
