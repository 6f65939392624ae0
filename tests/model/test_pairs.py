"""Writes of int4 caches, whose keys lie in pairs: bytes, and what they cost on TPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.kv_cache.layer import write
from pallas_kernels.compile.absent import absent_tpus
from pallas_kernels.quantized import Quantized, in_pairs, quantize, unpaired

PAGES, HEADS, PAGE, SIZE = 4, 2, 6, 32
BEYOND = PAGES * PAGE


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "index",
    [
        [[7]],
        [[4, 5, 6, 7, 8]],  # whole pairs, and halves at either end
        [[11, BEYOND, 3], [BEYOND, 10, 2]],  # pairs of two lines' tokens; some are not written
    ],
)
def test_writes_change_one_of_a_pair(index):
    """Catches a token in the place of its neighbor, or a neighbor that is lost."""
    index = jnp.array(index)
    pool = quantize(drawn(0, PAGES, HEADS, PAGE, SIZE), "int4")
    new = drawn(1, len(index), HEADS, index.shape[1], SIZE)
    pairs = write(in_pairs(pool), new, index)
    assert pairs.qvalue.shape == (PAGES, HEADS, PAGE // 2, SIZE)
    for ours, plain in zip(
        *map(jax.tree.leaves, (unpaired(pairs), write(pool, new, index))), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.absent_tpu
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 8192), (8, 8192), (8, 1)])
def test_a_tpu_writes_without_a_copy_of_the_pool(format, heads, tokens):
    """Catches a pool that is transposed for the write, and loops over tokens."""
    where = jax.sharding.SingleDeviceSharding(absent_tpus("v5p:2x2x1")[0])
    pool = jax.ShapeDtypeStruct((2**12, heads, 128, 128), jnp.float32)
    pool = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), pool)
    new = jax.ShapeDtypeStruct((1, heads, tokens, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    run = jax.jit(write, donate_argnums=0, in_shardings=where, out_shardings=where)
    compiled = run.lower(pool, new, index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**19 + 6 * new.size
    assert not re.search(r"\bwhile\(", compiled.as_text())


def test_what_lies_in_pairs():
    """Rows of up to 128 bytes, of int4, in an even number."""

    def paired(format, size, keys=PAGE):
        return in_pairs(quantize(drawn(0, 2, keys, size), format)).paired

    assert paired("int4", 128) and paired("int4", 16)
    assert not paired("int4", 256) and not paired("int4", 128, 5) and not paired("int8", 64)
    x = in_pairs(quantize(drawn(0, 2, PAGE, SIZE), "int4"))
    assert isinstance(x, Quantized) and x.shape == (2, PAGE, SIZE) and in_pairs(x) is x
