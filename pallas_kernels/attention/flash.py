"""`flash_attention`: one function, and the implementations behind it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import flash_cudnn, flash_mosaic, flash_splash, flash_xla
from pallas_kernels.attention.checks import (
    check_coords,
    check_ranks,
    check_rule,
    is_floating,
    take_mask,
)
from pallas_kernels.attention.masks import CAUSAL, Coords, Mask, coords_of
from pallas_kernels.choice import choose, resolve_config


@dataclasses.dataclass(frozen=True)
class FlashCase:
    """One call as known at trace time; arguments are explained at `flash_attention`."""

    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    scale: float
    mask: Mask = CAUSAL
    in_order: bool = False
    return_lse: bool = False
    plain: bool = False  # no coordinates were given
    interpret: Any = None


# Fastest first.
IMPLEMENTATIONS = (
    flash_mosaic.IMPLEMENTATION,
    flash_cudnn.IMPLEMENTATION,
    flash_splash.IMPLEMENTATION,
    flash_xla.IMPLEMENTATION,
)


def flash_attention(
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    q_coords: Coords | None = None,
    k_coords: Coords | None = None,
    *,
    scale: float,
    causal: bool = True,
    chunk: int | None = None,
    mask: Mask | None = None,
    in_order: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "B H S d"] | tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """softmax(scale * q @ k^T + mask) @ v, a block at a time (arXiv 2205.14135).

    Softmax and sums are float32 whatever the inputs. A query that sees nothing gives zeros and a
    log-sum-exp of -inf, so partial results over disjoint keys join with `merge`. Differentiable in
    reverse mode only.

    Args:
        q, k, v: query head `h` reads key/value head `h // (H / K)`.
        q_coords, k_coords: positions and segments of the queries and of the keys, which may lie in
            any order: lengths, padding, packing and an offset into a longer key sequence are all
            said this way. Default: one sequence a row, whose last S tokens are the queries.
        scale: multiplies the scores, usually d ** -0.5.
        causal: a query does not see later positions.
        chunk: tokens attend within the chunk `position // chunk` only; None for no chunks. Any
            size: it need not be a multiple of a block, since masks come from positions.
        mask: any other rule, in place of `causal` and `chunk`.
        in_order: promises that q_coords and k_coords are the same tokens, every segment contiguous
            and its positions strictly ascending.
        return_lse: also give the natural log-sum-exp of the scaled scores, and the output in
            float32, so that parts are rounded once, after they are joined ("xla" only; the others
            round to q's dtype before).
        implementation: "mosaic_gpu", "cudnn", "splash" or "xla"; None for the fastest that serves
            the call, which `flash_implementation` names.
        config: sizes, of that implementation's config type; default: those tuned for the device.
        interpret: runs a kernel without its hardware: `plgpu.InterpretGPUParams()` for
            "mosaic_gpu", `pltpu.InterpretParams()` for "splash", True for "cudnn" and "splash".

    Raises:
        ValueError: if the arguments do not fit together, or the named implementation does not
            serve them; says which value and what is allowed.
    """
    options = {
        "scale": scale, "causal": causal, "chunk": chunk, "mask": mask, "in_order": in_order,
        "return_lse": return_lse, "interpret": interpret,
    }  # fmt: skip
    case = _case(q, k, v, q_coords, k_coords, options)
    chosen = choose(IMPLEMENTATIONS, case, implementation)
    config = resolve_config(chosen, case, config)
    q_coords, k_coords = _coords(case, q_coords, k_coords)
    q_range = case.mask.key_range(q_coords)
    out, lse = chosen.run(q, k, v, q_range, k_coords, case, config)
    return (out.astype(jnp.float32), lse) if return_lse else out


def flash_implementation(
    q, k, v, q_coords=None, k_coords=None, *, implementation=None, **options
) -> str:
    """The implementation that `flash_attention` picks for such arguments on the current device.

    Args:
        q, k, v: arrays or ShapeDtypeStructs; all else as for `flash_attention`.
    """
    options.pop("config", None)
    case = _case(q, k, v, q_coords, k_coords, options)
    return choose(IMPLEMENTATIONS, case, implementation).name


def _case(q, k, v, q_coords, k_coords, options: dict) -> FlashCase:
    _check(q, k, v, q_coords, k_coords, **options)
    (B, H, S, d), (_, K, T, _) = q.shape, k.shape
    dtype = jnp.dtype(q.dtype).name
    options["mask"] = take_mask(options)
    plain = q_coords is None and k_coords is None
    options["in_order"] = options.get("in_order", False) or (plain and S == T)
    return FlashCase(B, H, K, S, T, d, dtype, plain=plain, **options)


def _check(
    q, k, v, q_coords, k_coords, *, scale, chunk=None, mask=None, in_order=False, **_
) -> None:
    check_ranks(q, k, v)
    (B, H, S, d), (_, K, T, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (B, K, T, d):
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [rows, key heads, keys, head size] with the "
            f"{B} rows and the head size {d} of q {q.shape}."
        )
    if not q.dtype == k.dtype == v.dtype or not is_floating(q):
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; use one floating type for all."
        )
    check_rule(H, K, scale, chunk, mask)
    if q_coords is None and (k_coords is not None or S > T):
        raise ValueError(
            f"{S} queries and {T} keys need q_coords: without them the queries are the last keys."
        )
    if in_order and S != T:
        raise ValueError(f"in_order needs as many queries as keys, not {S} and {T}.")
    check_coords(q_coords=(q_coords, B, S), k_coords=(k_coords, B, T))


def _coords(case: FlashCase, q_coords, k_coords) -> tuple[Coords, Coords]:
    if q_coords is None:
        q_coords = coords_of(case.rows, case.queries, start=case.keys - case.queries)
    return q_coords, coords_of(case.rows, case.keys) if k_coords is None else k_coords
