"""Flash attention on TPUs, of tokens to themselves: the splash kernel that JAX ships.

The kernel is causal by slot, or sees all slots, and separates segments. That is the whole rule for
tokens in order, once every run of one segment and chunk is a segment of its own.
"""

import dataclasses
import functools
import itertools
import math
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from pallas_kernels.attention import flash_xla
from pallas_kernels.attention.masks import Coords, KeyRange, Mask
from pallas_kernels.choice import Implementation
from pallas_kernels.tpu import LANES, why_not_tpu

# Of the kernel's products; by default a TPU would round float32 operands to bfloat16.
PRECISION = {"bfloat16": "default", "float32": "highest"}
LARGEST_HEAD = 256  # what fits on chip


@dataclasses.dataclass(frozen=True)
class FlashSplashConfig:
    """Queries and keys a block, multiples of 128; short or uneven lengths take less."""

    block_q: int = 1024
    block_k: int = 1024

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < LANES or size % LANES:
                raise ValueError(f"{name} {size} must be a multiple of {LANES}.")


def config_for(case) -> FlashSplashConfig:
    """The largest blocks that fit on the chips of every generation from v4 on."""
    return (
        FlashSplashConfig()
        if case.dtype == "bfloat16" and case.head_dim <= 128
        else FlashSplashConfig(512, 512)
    )


def why_not(case) -> str | None:
    """Why a call cannot run on this kernel, or None."""
    if case.dtype not in PRECISION:
        return f"it takes {' or '.join(PRECISION)}, not {case.dtype}"
    if case.head_dim > LARGEST_HEAD:
        return f"it takes head sizes up to {LARGEST_HEAD}, not {case.head_dim}"
    if not case.mask.block_diagonal:
        return "it takes no windows"
    if not case.in_order:
        return "it takes in_order calls only"
    return why_not_tpu(case.interpret)


def flash_splash(q, k, v, q_range: KeyRange, k_coords: Coords, case, config: FlashSplashConfig):
    """Output [B, H, S, d], and log-sum-exp [B, H, S] if the case wants it, else None.

    The kernel scales nothing, so q is scaled before and rounded to its own type once more: exact
    only if the scale is a power of two, as for head size 64.
    """
    return _attend(case, config, q, k, v, q_range, k_coords)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(case, config: FlashSplashConfig, q, k, v, q_range: KeyRange, k_coords: Coords):
    with jax.default_matmul_precision(PRECISION[case.dtype]):
        return _splash(case, config, q_range, k_coords, q, k, v)


def _attend_forward(case, config, q, k, v, q_range, k_coords):
    """The kernel has no gradient of its log-sum-exp: with that, all of it runs on XLA."""
    function = _xla if case.return_lse else _splash
    run = functools.partial(function, case, config, q_range, k_coords)
    with jax.default_matmul_precision(PRECISION[case.dtype]):
        return jax.vjp(run, q, k, v)


def _attend_backward(case, config, transpose, cotangents):
    with jax.default_matmul_precision(PRECISION[case.dtype]):
        return *transpose(cotangents), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _xla(case, config, q_range, k_coords, q, k, v):
    out, lse = flash_xla.flash_xla(q, k, v, q_range, k_coords, case, flash_xla.FlashXlaConfig())
    return out.astype(q.dtype), lse


def computed_blocks(case, config: FlashSplashConfig) -> int:
    """How many blocks of scores of a head the kernel computes; it steps over the others.

    Args:
        case: a `FlashCase` whose mask is causal.
    """
    block_q, block_k = _blocks(case, config)
    length = case.queries + _extra(case, config)
    mask = _Slots(length, case.mask, aligned=case.plain)
    starts = itertools.product(range(0, length, block_q), range(0, length, block_k))
    return sum(mask[slice(q, q + block_q), slice(k, k + block_k)].item() for q, k in starts)


def _splash(case, config, q_range, k_coords, q, k, v):
    S, blocks, extra = case.queries, _blocks(case, config), _extra(case, config)
    q = (q.astype(jnp.float32) * case.scale).astype(q.dtype)
    real = (q_range.segment != 0)[:, None]
    # What padding holds may be NaN, which a probability of 0 does not undo.
    q, k, v = (jnp.where(real[..., None], x, 0) for x in (q, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (q, k, v))
    attend = jax.vmap(_kernel(case, S + extra, *blocks))
    out, *lse = jax.tree.leaves(attend(q, k, v, _segments(case, q_range, extra)))
    # Padding sees itself in the kernel, which must not get a query that sees nothing.
    out = jnp.where(real[..., None], out[:, :, :S], 0)
    return out, jnp.where(real, lse[0][:, :, :S], -jnp.inf) if lse else None


def _blocks(case, config: FlashSplashConfig) -> tuple[int, int]:
    """Queries and keys of a block."""
    return _even_block(case.queries, config.block_q), _even_block(case.queries, config.block_k)


def _extra(case, config: FlashSplashConfig) -> int:
    """Padding that makes whole blocks of the queries, and of the keys, which are as many."""
    return -case.queries % math.lcm(*_blocks(case, config))


def _even_block(length: int, largest: int) -> int:
    """The size of equal blocks, up to `largest` and in whole lanes, that pads `length` least."""
    parts = -(-length // largest)
    return -(-length // (parts * LANES)) * LANES


def _segments(case, q_range: KeyRange, extra: int) -> splash.SegmentIds | None:
    """An id for each run of tokens of one segment and chunk; None where all are of one."""
    apart = extra and not case.mask.causal  # padding at the end, which earlier slots would see
    if case.plain and case.mask.span is None and not apart:
        return None
    parts = [q_range.segment]
    if case.mask.span is not None:
        parts.append(q_range.first)
    starts = [jnp.diff(part, axis=1, prepend=part[:, :1]) != 0 for part in parts]
    ids = jnp.cumsum(functools.reduce(operator.or_, starts), axis=1, dtype=jnp.int32)
    ids = jnp.pad(ids, ((0, 0), (0, extra)), constant_values=-1)
    return splash.SegmentIds(ids, ids)


def _kernel(case, length: int, block_q: int, block_k: int):
    """The library's kernel for one row."""
    mask = splash.FullMask((length, length))
    if case.mask.causal:
        mask = _Slots(length, case.mask, aligned=case.plain)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_k, block_q_dq=block_q, block_kv_dq=block_k,
        block_q_dkv=block_q, block_kv_dkv=block_k,
    )  # fmt: skip
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * case.heads),
        block_sizes=sizes,
        save_residuals=case.return_lse,
        interpret=bool(case.interpret),
    )


@dataclasses.dataclass(frozen=True)
class _Slots(splash.Mask):
    """Causal by slot, leaving out blocks of keys before those that any query sees.

    The library's own masks evaluate length x length booleans: minutes, at 100k tokens.
    """

    length: int
    mask: Mask
    aligned: bool  # slots are positions; otherwise a chunk may begin anywhere
    mask_function: ClassVar = operator.ge  # of slots, in the kernel

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def q_sequence(self) -> np.ndarray:
        """The slots of the queries."""
        return np.arange(self.length, dtype=np.int32)

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        """Whether any query of a block may see any key: the library asks no more of it."""
        q, k = idx
        first, span = 0, self.mask.span
        if span is not None:
            first = self.mask.first(q.start) if self.aligned else q.start - span + 1
        return np.array([[k.start < q.stop and k.stop > first]])


IMPLEMENTATION = Implementation("splash", why_not, flash_splash, FlashSplashConfig, config_for)
