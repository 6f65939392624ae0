"""GPU kernels of `jaxmoe benchmark schedule`: jaxmoe's and JAX's own, at Llama 4's sizes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.attention.cases import CHUNK, HEAD_DIM, HEADS, KV_HEADS, SCALE
from jaxmoe.config import SCOUT
from pallas_kernels.attention import Coords, coords_of, decode_attention, flash_attention
from pallas_kernels.experts import gated_matmul, grouped_matmul
from pallas_kernels.quantized import quantize, quantize_matrix

OURS = "jaxmoe"
ELEMENT_BYTES = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}  # by format
ROWS, CONTEXT = 8, 131072  # decoding's rows, and cached tokens of each
D, F, EXPERTS = SCOUT.hidden_size, SCOUT.intermediate_size, SCOUT.num_local_experts
TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile, whose last kernel with tensor-core products is analyzed.

    Attributes:
        kernel: the kernel's name in the tables.
        by: whose kernel it is: jaxmoe, or a module of `jax.experimental.pallas.ops.gpu`.
        function: the program.
        shapes: its arguments as ShapeDtypeStructs.
        element: bytes per element of the operand that the kernel reads from memory exactly once;
            None if it has none.
    """

    kernel: str
    by: str
    function: Callable
    shapes: tuple
    element: float | None = None

    @property
    def name(self) -> str:
        return self.kernel if self.by == OURS else f"{self.kernel}-{self.by}"


def all_cases() -> list[Case]:
    """All cases; kernels that compute the same follow one another."""
    return [*_attention(), *_decode(), *_experts()]


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array without data."""
    return jax.ShapeDtypeStruct(shape, dtype)


def coords(rows: int, tokens: int) -> Coords:
    """The coordinates of rows of one sequence each, without data."""
    return jax.eval_shape(lambda: coords_of(rows, tokens))


def _attention() -> Iterator[Case]:
    """Attention, forward and each gradient alone, so that a program has one kernel to analyze."""
    key = shaped(1, KV_HEADS, CHUNK, HEAD_DIM)
    ours = shaped(1, HEADS, CHUNK, HEAD_DIM), key, key, *[coords(1, CHUNK)] * 2
    key = shaped(1, CHUNK, KV_HEADS, HEAD_DIM, dtype=jnp.float16)  # JAX's takes no other
    theirs = shaped(1, CHUNK, HEADS, HEAD_DIM, dtype=jnp.float16), key, key
    for kernel, wanted in (("forward", None), ("dq", slice(0, 1)), ("dkv", slice(1, 3))):
        for by, attend, shapes in (
            (OURS, _flash, ours),
            ("attention_mgpu", _attention_mgpu, theirs),
        ):
            yield Case(f"flash-{kernel}", by, functools.partial(_gradients, attend, wanted), shapes)


def _flash(q, k, v, *coords, differentiated: bool):
    return flash_attention(q, k, v, *coords, scale=SCALE, implementation="mosaic_gpu")


def _attention_mgpu(q, k, v, differentiated: bool):
    """JAX's attention kernel, causal in the forward pass only, since its gradient cannot be."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128,
        max_concurrent_steps=2,
        causal=not differentiated,
        compute_wgs_bwd=2,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
    return attention_mgpu.attention(q, k, v, config)


def _gradients(attend: Callable, wanted: slice | None, q, k, v, *coords):
    """The wanted ones of the gradients (dq, dk, dv); the output if `wanted` is None."""
    attended = functools.partial(attend, differentiated=wanted is not None)
    if wanted is None:
        return attended(q, k, v, *coords)
    return jax.vjp(lambda *qkv: attended(*qkv, *coords), q, k, v)[1](q)[wanted]


def _decode() -> Iterator[Case]:
    attend = functools.partial(decode_attention, scale=SCALE, implementation="mosaic_gpu")
    kv = shaped(ROWS, KV_HEADS, CONTEXT, HEAD_DIM)
    for format in ELEMENT_BYTES:
        stored = kv if format == "bf16" else jax.eval_shape(lambda x, f=format: quantize(x, f), kv)
        shapes = shaped(ROWS, HEADS, 1, HEAD_DIM), stored, stored, coords(ROWS, 1)
        shapes = *shapes, coords(ROWS, CONTEXT)
        yield Case(f"decode-{format}", OURS, attend, shapes, ELEMENT_BYTES[format])


def _experts() -> Iterator[Case]:
    yield _grouped("grouped", _product, 128)
    yield Case(
        "grouped",
        "ragged_dot_mgpu",
        _ragged_dot,
        (*_dense(EXPERTS), shaped(EXPERTS, dtype=jnp.int32)),
    )
    yield Case("grouped", "hopper_matmul_mgpu", _hopper_matmul, _dense())
    yield _grouped("gated", _gated, 128)
    for format in ELEMENT_BYTES:
        yield _grouped(f"grouped-8-{format}", _product, 8, format)
    for rows, format in ((128, "int8"), (64, "int4")):
        yield _grouped(f"grouped-{rows}-{format}", _product, rows, format)


def _grouped(kernel: str, function: Callable, block: int, format: str = "bf16") -> Case:
    """A grouped matmul. Only blocks of 8 rows count memory, since they read each matrix once."""
    blocks = TOKENS // block
    w = shaped(EXPERTS, D, F)
    if format != "bf16":
        w = jax.eval_shape(lambda w: quantize_matrix(w, format, None), w)
    shapes = shaped(blocks * block, D), w, shaped(blocks, dtype=jnp.int32)
    return Case(kernel, OURS, function, shapes, ELEMENT_BYTES[format] if block == 8 else None)


def _product(x, w, group):
    return grouped_matmul(x, w, group, implementation="mosaic_gpu")


def _gated(x, w, group):
    return gated_matmul(x, w, w, group, implementation="mosaic_gpu")


def _dense(*groups: int) -> tuple:
    return shaped(TOKENS, D, dtype=jnp.float16), shaped(*groups, D, F, dtype=jnp.float16)


def _ragged_dot(x, w, group_sizes):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    sizes = {"block_m": 64, "block_n": 128, "block_k": 64}
    return ragged_dot_mgpu.ragged_dot(
        x, w, group_sizes=group_sizes, **sizes, max_concurrent_steps=4, grid_block_n=8
    )


def _hopper_matmul(x, w):
    """JAX's dense matmul, of all groups' rows by one matrix."""
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as module

    options = {"grid_tile_width": 8, "wg_dimension": module.MatmulDimension.M}
    config = module.TuningConfig(64, 256, 64, max_concurrent_steps=4, **options)
    return module.matmul(x, w, None, config)
