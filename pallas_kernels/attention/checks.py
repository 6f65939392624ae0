"""Checks of the arguments of attention functions; each raises a ValueError with the value."""

import jax.numpy as jnp

from pallas_kernels.attention.masks import Mask, make_mask


def check_ranks(q, k, v) -> None:
    """Raises unless q, k and v have four axes, none of them empty."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} {x.shape} must be [rows, heads, tokens, head size], none of them 0."
            )


def check_rule(heads: int, kv_heads: int, scale: float, chunk: int | None, mask) -> None:
    """Raises for numbers of heads, a scale, a chunk or a mask that cannot be."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key heads.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be 1 or more, or None for no chunks.")
    if mask is not None and chunk is not None:
        raise ValueError(f"mask {mask} and chunk {chunk} are both given; use one of them.")
    if not scale > 0:
        raise ValueError(f"scale {scale} must be positive; it is usually head_size ** -0.5.")


def take_mask(options: dict) -> Mask:
    """The mask that `causal`, `chunk` and `mask` mean, which are removed from a call's options."""
    causal, chunk = options.pop("causal", True), options.pop("chunk", None)
    mask = options.pop("mask", None)
    return make_mask(causal, chunk) if mask is None else mask


def check_coords(**given) -> None:
    """Raises unless each of (coords or None, rows, tokens) has coordinates [rows, tokens]."""
    for name, (coords, rows, tokens) in given.items():
        for x in coords or ():
            if x.shape != (rows, tokens):
                raise ValueError(f"{name} has shape {x.shape}; it must be {(rows, tokens)}.")


def is_floating(x) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)
