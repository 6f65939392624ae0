"""Flash attention by cuDNN, NVIDIA's library, of tokens to themselves.

cuDNN masks by slot: later keys, and those past the end of a row. That is the whole rule where each
row, or each chunk of it, begins with its tokens, all of one segment, and padding follows. Without
coordinates it is so; otherwise one branch a call looks at them, and other tokens go by XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention import flash_xla
from pallas_kernels.attention.masks import Coords, KeyRange, pad_tokens
from pallas_kernels.choice import Implementation
from pallas_kernels.platform import target

DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 128  # of GPUs before Hopper


@dataclasses.dataclass(frozen=True)
class FlashCudnnConfig:
    """Nothing to configure: cuDNN chooses its own sizes."""


def why_not(case) -> str | None:
    """Why a call cannot run on cuDNN, or None."""
    if case.dtype not in DTYPES:
        return f"it takes {' or '.join(DTYPES)}, not {case.dtype}"
    if case.head_dim > LARGEST_HEAD or case.head_dim % 8:
        return f"it takes head sizes that are multiples of 8 up to {LARGEST_HEAD}"
    if not case.mask.causal or not case.mask.block_diagonal:
        return "it is used for causal attention only, to all tokens or those of a chunk"
    if not case.in_order:
        return "it takes in_order calls only"
    if case.return_lse:
        return "JAX rounds its log-sum-exp to the type of the queries"
    if case.interpret is True:
        return None
    device = target()
    if not device.has_cudnn_attention:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, and this is {device}"
    return _why_jax_does_not()


def _why_jax_does_not() -> str | None:
    """JAX looks for the library when it traces a call, also for devices that are not there."""
    few = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_attention, None, None, 1.0), few, few, few)
    except (RuntimeError, NotImplementedError) as error:
        return f"JAX refuses: {error}"
    return None


def flash_cudnn(q, k, v, q_range: KeyRange, k_coords: Coords, case, config: FlashCudnnConfig):
    """Output [B, H, S, d], and no log-sum-exp."""
    if case.plain:
        return _cudnn(case, q_range, q, k, v), None
    cudnn = functools.partial(_cudnn, case, q_range)
    xla = functools.partial(_xla, case, q_range, k_coords)
    return lax.cond(_serves(case, q_range), cudnn, xla, q, k, v), None


def _xla(case, q_range, k_coords, q, k, v):
    return flash_xla.flash_xla(q, k, v, q_range, k_coords, case, flash_xla.config_for(case))[0]


def _length(case) -> int:
    """The length of the rows that cuDNN gets: one chunk each, if there are several."""
    return min(case.queries, case.mask.span or case.queries)


def _rows(x: jax.Array, length: int) -> jax.Array:
    """Reshapes [B, S, ...] to [B * chunks, length, ...]."""
    return x.reshape(-1, length, *x.shape[2:])


def _serves(case, q_range: KeyRange) -> jax.Array:
    """Whether every row that cuDNN gets begins with its tokens, of one segment and chunk."""
    first, _, segment = (_rows(x, _length(case)) for x in pad_tokens(q_range, _length(case)))
    real = segment != 0
    same = segment == segment[:, :1]
    if case.mask.span is not None:
        same &= first == first[:, :1]
    # The first of a row without tokens is padding as well, and the same as the others.
    return jnp.all(same | ~real)


def _cudnn(case, q_range: KeyRange, q, k, v):
    length = _length(case)
    real = _rows(pad_tokens(q_range, length).segment != 0, length)
    q, k, v = (_rows(pad_axis(jnp.swapaxes(x, 1, 2), 1, length), length) for x in (q, k, v))
    if case.plain and case.queries % length == 0:
        out = _attention(None, case.interpret, case.scale, q, k, v)
    else:  # what cuDNN makes of padding is not said
        real = real[..., None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        lengths = jnp.maximum(real.sum((1, 2, 3), dtype=jnp.int32), 1)
        out = _attention(lengths, case.interpret, case.scale, q, k, v)
        out = jnp.where(real, out, 0)
    out = out.reshape(case.rows, -1, *out.shape[2:])[:, : case.queries]
    return jnp.swapaxes(out, 1, 2)


def _attention(lengths, interpret, scale: float, q, k, v):
    """Attention of arrays [rows, tokens, heads, head size]; interpreted, JAX runs it on XLA."""
    return jax.nn.dot_product_attention(
        *(q, k, v),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="xla" if interpret else "cudnn",
    )


IMPLEMENTATION = Implementation(
    "cudnn", why_not, flash_cudnn, FlashCudnnConfig, lambda case: FlashCudnnConfig()
)
