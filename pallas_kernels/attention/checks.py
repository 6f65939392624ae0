"""What both attention functions ask of their arguments, each a ValueError with the value."""

import jax.numpy as jnp


def check_ranks(q, k, v) -> None:
    """q, k and v have four axes, none of them empty."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} {x.shape} must be [rows, heads, tokens, head size], none of them 0."
            )


def check_rule(heads: int, kv_heads: int, scale: float, chunk: int | None) -> None:
    """The numbers that say which keys a query sees, and how."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key heads.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be 1 or more, or None for no chunks.")
    if not scale > 0:
        raise ValueError(f"scale {scale} must be positive; it is usually head_size ** -0.5.")


def check_coords(**given) -> None:
    """Each is (coords or None, rows, tokens)."""
    for name, (coords, rows, tokens) in given.items():
        for x in coords or ():
            if x.shape != (rows, tokens):
                raise ValueError(f"{name} has shape {x.shape}; it must be {(rows, tokens)}.")


def is_floating(x) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)
