"""Decode attention, compiled for absent TPUs at Llama 4's shapes."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import Coords, decode_attention, decode_implementation
from pallas_kernels.compile.absent import absent_tpus, lower_for, mesh_of
from pallas_kernels.quantized import in_pairs, quantize, unpaired

TPUS = "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"
PAGE, SIZE, GROUP = 128, 128, 5
pytestmark = pytest.mark.absent_tpu


def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(rows, kv_heads, queries, columns, format, pages=None):
    """The arguments of decode attention, as shapes: `columns` pages a row, in a pool of `pages`.

    By default the pool has a page for each of those of the rows, and one of padding.
    """
    pages = rows * columns + 1 if pages is None else pages
    keys = shaped(pages, kv_heads, PAGE, SIZE, dtype=jnp.bfloat16)
    if format != "bf16":
        keys = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), keys)
    q = shaped(rows, kv_heads * GROUP, queries, SIZE, dtype=jnp.bfloat16)
    coords = Coords(*[shaped(rows, queries)] * 2), Coords(*[shaped(pages, PAGE)] * 2)
    return q, keys, keys, *coords, shaped(rows, columns)


def attend(q, k, v, q_coords, k_coords, table):
    return decode_attention(
        q, k, v, q_coords, k_coords, table=table, scale=SIZE**-0.5, return_lse=True
    )


# Rows, key heads, queries, pages of a row, format, the pool's pages.
MILLION = [(1, 1, 1, 2**13, format, None) for format in ("int8", "int4")]


@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        *((topology, shape) for topology in TPUS for shape in MILLION),
        ("v5p:2x2x1", (1, 1, 1, 2**13, "bf16", None)),
        ("v5p:2x2x1", (1, 1, 4, 81920, "int8", None)),  # ten million keys, four queries
        ("tpu7x:2x2x1", (1, 8, 1, 2**13, "fp8", None)),
        ("v6e:2x2", (256, 1, 1, 512, "int8", 2**14)),  # rows that share a pool
        ("v5p:2x2x1", (256, 1, 1, 512, "int4", 2**14)),
        ("v6e:2x2", (64, 8, 1, 64, "bf16", None)),  # rings of a chunk
        ("v6e:2x2", (64, 8, 1, 64, "int4", None)),
    ],
)
def test_compiles_without_a_copy_of_the_pool(topology, shape):
    """One kernel for all blocks: no loop of XLA's over them, and no memory that grows with keys."""
    (device, *_), shapes = absent_tpus(topology), arguments(*shape)
    with jax.sharding.use_abstract_mesh(mesh_of(device).abstract_mesh):
        assert decode_implementation(*shapes[:5], table=shapes[5], scale=1.0) == "mosaic_tpu"
    compiled = lower_for(device, attend, *shapes).compile()
    entries = 512 * shapes[-1].size  # bytes, of lists of pages, which have 32 KiB of keys each
    assert compiled.memory_analysis().temp_size_in_bytes < 2**21 + entries
    assert not re.search(r"\bwhile\(", compiled.as_text())


def test_int4_would_be_copied():
    """Two values a byte make rows of half a vector, unless two keys share one."""
    (device, *_), (q, k, v, *shapes) = absent_tpus(TPUS[0]), arguments(1, 1, 1, 64, "int4")
    keys = jax.eval_shape(lambda *x: tuple(map(unpaired, x)), k, v)
    chosen = functools.partial(
        decode_implementation, q, *keys, *shapes[:2], table=shapes[2], scale=1.0
    )
    with jax.sharding.use_abstract_mesh(mesh_of(device).abstract_mesh):
        assert chosen() == "xla"
        with pytest.raises(
            ValueError, match="multiple of 128 stored numbers, not 128 in rows of 64"
        ):
            chosen(implementation="mosaic_tpu")


def test_longer_pages_are_refused():
    """The compiler takes no copy of a single page's coordinates there."""
    (device, *_), (q, k, _, q_coords, _, table) = (
        absent_tpus(TPUS[0]),
        arguments(1, 1, 1, 64, "bf16"),
    )
    pages = shaped(k.shape[0], 1, 2 * PAGE, SIZE, dtype=k.dtype)
    coords = Coords(*[shaped(k.shape[0], 2 * PAGE)] * 2)
    with jax.sharding.use_abstract_mesh(mesh_of(device).abstract_mesh):
        chosen = decode_implementation(q, pages, pages, q_coords, coords, table=table, scale=1.0)
    assert chosen == "xla"
