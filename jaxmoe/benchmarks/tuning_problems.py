"""The problems of `jaxmoe tune`: each kernel at Llama 4's sizes, with the configs to try."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.attention.cases import CHUNK, HEADS, KV_HEADS
from pallas_kernels.attention import CAUSAL, Coords, coords_of, decode_attention, flash_attention
from pallas_kernels.attention.decode import DecodeCase
from pallas_kernels.attention.decode_config import (
    STORED,
    columns_of,
    untuned_config,
)
from pallas_kernels.attention.flash_mosaic import HEAD_DIMS, FlashMosaicConfig
from pallas_kernels.attention.mosaic_backward import BackwardConfig, flash_backward
from pallas_kernels.attention.mosaic_forward import ForwardConfig
from pallas_kernels.quantized import quantize

ROWS, LONG = 8, 131072  # decoding's rows, and its cached tokens per row
QUERIES = (1, 4)  # decoding's new tokens per row


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kernel and size to choose a config for, one entry of a file in `pallas_kernels/tuned`.

    Attributes:
        op: the kernel's name.
        key: what the config depends on, such as the head size.
        candidates: configs in order of preference, which decides if nothing is timed.
        call: runs the kernel on a config, coordinates of queries and keys, and other arrays.
        coords: makes the coordinates.
        shapes: of the other arrays.
    """

    op: str
    key: dict[str, Any]
    candidates: list
    call: Callable
    coords: Callable[[], tuple[Coords, Coords]]
    shapes: tuple

    def arguments(self) -> tuple:
        """The arguments of `call` after the config, as ShapeDtypeStructs."""
        return *jax.eval_shape(self.coords), *self.shapes


def all_problems() -> list[Problem]:
    """All problems, in the order of the file."""
    return [*map(_forward, HEAD_DIMS), *map(_backward, HEAD_DIMS), *_decode()]


def _grid(first, **choices) -> list:
    """The config `first`, then it with every combination of the choices, earlier ones first."""
    combinations = (
        dataclasses.replace(first, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    )
    return list(dict.fromkeys([first, *combinations]))


def _shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _qkv(head_dim: int) -> tuple:
    key = _shaped(1, KV_HEADS, CHUNK, head_dim)
    return _shaped(1, HEADS, CHUNK, head_dim), key, key


def _same_tokens() -> tuple[Coords, Coords]:
    return coords_of(1, CHUNK), coords_of(1, CHUNK)


def _forward(head_dim: int) -> Problem:
    candidates = _grid(ForwardConfig(), block_k=(128, 64, 256), slots=(2, 3, 4))

    def call(config, q_coords, k_coords, q, k, v):
        options = {"scale": head_dim**-0.5, "implementation": "mosaic_gpu"}
        config = FlashMosaicConfig(forward=config)
        return flash_attention(q, k, v, q_coords, k_coords, config=config, **options)

    key = {"head_dim": head_dim}
    return Problem("flash_forward", key, candidates, call, _same_tokens, _qkv(head_dim))


def _backward(head_dim: int) -> Problem:
    candidates = _grid(
        BackwardConfig(), block_k=(64, 128), dq_slots=(2, 3), block_q=(64, 128), dkv_slots=(2, 3)
    )

    def call(config, q_coords, k_coords, saved, d_out, d_lse):
        q_range = CAUSAL.key_range(q_coords)
        options = {"scale": head_dim**-0.5, "config": config, "interpret": None}
        return flash_backward(saved, d_out, d_lse, q_range, k_coords, **options)

    q, k, v = _qkv(head_dim)
    lse = _shaped(*q.shape[:3], dtype=jnp.float32)
    key, shapes = {"head_dim": head_dim}, ((q, k, v, q, lse), q, lse)
    return Problem("flash_backward", key, candidates, call, _same_tokens, shapes)


def _decode() -> Iterator[Problem]:
    for cache, head_dim in itertools.product(("bfloat16", *STORED), HEAD_DIMS):
        if (cache, head_dim) == ("int4", 64):
            continue  # the kernel does not serve int4 heads of 64
        for queries in QUERIES:
            yield _decode_problem(cache, head_dim, queries)


def _decode_problem(cache: str, head_dim: int, queries: int) -> Problem:
    sizes = ROWS, HEADS, KV_HEADS, queries, LONG, head_dim
    case = DecodeCase(*sizes, "bfloat16", cache, page=None, scale=head_dim**-0.5)
    key = {"cache": cache, "head_dim": head_dim, "columns": columns_of(case)}
    candidates = _grid(untuned_config(case), block_k=(64, 128), slots=(4, 3, 2))

    def call(config, q_coords, k_coords, q, k, v):
        options = {"scale": case.scale, "implementation": "mosaic_gpu"}
        return decode_attention(q, k, v, q_coords, k_coords, config=config, **options)

    def coords():
        return coords_of(ROWS, queries, start=LONG - queries), coords_of(ROWS, LONG)

    tokens = _cache(cache, head_dim)
    shapes = _shaped(ROWS, HEADS, queries, head_dim), tokens, tokens
    return Problem("decode", key, candidates, call, coords, shapes)


def _cache(cache: str, head_dim: int):
    """The shape of a cache's keys or values, quantized in the cache's format."""
    tokens = _shaped(ROWS, KV_HEADS, LONG, head_dim)
    return tokens if cache == "bfloat16" else jax.eval_shape(lambda x: quantize(x, cache), tokens)
