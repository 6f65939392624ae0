"""Attention of a prefill to Scout's cache of a million tokens, compiled for absent TPUs."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import Coords, paged_attention
from pallas_kernels.compile.absent import absent_tpus, lower_for
from pallas_kernels.quantized import in_pairs, quantize

pytestmark = pytest.mark.absent_tpu

QUERIES, KEYS, PAGE, SIZE = 8192, 2**20, 128, 128
POOL = KEYS // PAGE + 1
V5P, V6E, V7X = "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"


def array(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def arguments(heads, format, rows=1):
    """Queries, the cache, coordinates, and the pages of each row."""
    queries, pool = (rows, QUERIES // rows), (POOL, heads[1], PAGE)
    k = v = array(*pool, SIZE, dtype="bfloat16")
    if format != "bfloat16":
        k = v = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), k)
    coords = [Coords(array(*x), array(*x)) for x in (queries, (POOL, PAGE))]
    q = array(rows, heads[0], queries[1], SIZE, dtype="bfloat16")
    return q, k, v, *coords, array(rows, KEYS // PAGE // rows)


def attend(*arguments):
    return paged_attention(*arguments, scale=SIZE**-0.5)


@pytest.mark.parametrize(
    ("topology", "heads", "format", "rows"),
    [(V5P, (40, 8), format, None) for format in ("bfloat16", "int8", "int4")]
    + [(V5P, (5, 1), "int8", 4), (V6E, (5, 1), "bfloat16", 4)]
    + [(topology, (5, 1), "int4", 4) for topology in (V5P, V7X)],
)
def test_one_kernel_reads_the_pages_where_they_lie(topology, heads, format, rows):
    """Catches what does not fit on chip, loops over the cache, and copies of it or of its parts."""
    shapes = arguments(heads, format, rows or 1)
    if rows is None:  # sequences side by side
        shapes = *shapes, shapes[-1]
    compiled = lower_for(absent_tpus(topology)[0], attend, *shapes).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search(r"\b(while|conditional)\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 2**20  # the cache has 128 or more
