"""What both attention functions ask of their arguments, each a ValueError with the value."""

import jax.numpy as jnp

from pallas_kernels.attention.masks import Mask, make_mask


def check_ranks(q, k, v) -> None:
    """q, k and v have four axes, none of them empty."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} {x.shape} must be [rows, heads, tokens, head size], none of them 0."
            )


def check_rule(heads: int, kv_heads: int, scale: float, chunk: int | None, mask) -> None:
    """The numbers that say which keys a query sees, and how."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key heads.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be 1 or more, or None for no chunks.")
    if mask is not None and chunk is not None:
        raise ValueError(f"mask {mask} and chunk {chunk} are both given; use one of them.")
    if not scale > 0:
        raise ValueError(f"scale {scale} must be positive; it is usually head_size ** -0.5.")


def take_mask(options: dict) -> Mask:
    """Takes `causal`, `chunk` and `mask` out of a call's options; the mask that they mean."""
    causal, chunk = options.pop("causal", True), options.pop("chunk", None)
    mask = options.pop("mask", None)
    return make_mask(causal, chunk) if mask is None else mask


def check_coords(**given) -> None:
    """Each is (coords or None, rows, tokens)."""
    for name, (coords, rows, tokens) in given.items():
        for x in coords or ():
            if x.shape != (rows, tokens):
                raise ValueError(f"{name} has shape {x.shape}; it must be {(rows, tokens)}.")


def is_floating(x) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)
