"""The model with the TPU kernel that reads the pages for many tokens, in the interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.benchmarks.schedule.tpu_steps import Program
from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.model.kv_cache import PAGE, init_cache, layer, ring
from jaxmoe.model.packing import Packing
from jaxmoe.model.params import init_params
from jaxmoe.model.transformer import forward
from pallas_kernels.attention import paged_attention
from pallas_kernels.attention.tpu_tiles import PagedTpuConfig
from pallas_kernels.compile.absent import absent_tpus, mesh_of
from pallas_kernels.compile.tpu_schedule import Core

# The second step's local layer sees the ring, and some of its tokens are of another chunk.
CONFIG = dataclasses.replace(
    SCOUT,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    vocab_size=64,
    num_local_experts=1,  # no token changes its expert for a rounding
    attention_chunk_size=128,
    max_position_embeddings=2048,
    layers=layer_kinds(2, nope_interval=2),
)
ROWS, STEP = 2, 100
LENGTHS = [(100, 60), (70, 80)]  # new tokens of each row, in each step


def in_rows(tokens, starts, lengths):
    """Tokens, positions and segments, a line a row."""
    index = np.broadcast_to(np.arange(STEP), (ROWS, STEP))
    segments = (index < np.array(lengths)[:, None]).astype(np.int32)
    place = np.minimum(index + np.array(starts)[:, None], tokens.shape[1] - 1)
    return (np.take_along_axis(tokens, place, 1), place, segments), None


def packed(tokens, starts, lengths):
    """Tokens of all rows side by side on one line."""
    (*new, segments), _ = in_rows(tokens, starts, lengths)
    row = np.repeat(np.arange(ROWS), lengths)

    def line(x):
        joined = np.concatenate([x[i, :length] for i, length in enumerate(lengths)])
        return np.pad(joined, (0, ROWS * STEP - len(joined)))[None].astype(np.int32)

    numbered = line(segments * np.arange(1, ROWS + 1)[:, None])
    row = np.pad(row, (0, ROWS * STEP - len(row)))[None].astype(np.int32)
    packing = Packing(row, np.zeros(row.shape, bool), np.arange(ROWS, dtype=np.int32)[None])
    return (*map(line, new), numbered), packing


def hidden_states(params, lay):
    """Hidden values of all real tokens, in two steps through a cache."""
    run = jax.jit(functools.partial(forward, CONFIG))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, 256), np.int32)
    cache, starts, found = init_cache(CONFIG, ROWS, 256, jnp.float32), np.zeros(ROWS, int), []
    for lengths in LENGTHS:
        inputs, packing = lay(tokens, starts, lengths)
        out = run(params, *inputs, cache, packing=packing)
        found.append(np.asarray(out.hidden)[inputs[2] != 0])
        cache, starts = out.cache, starts + lengths
    return np.concatenate(found)


def through_the_kernel(calls, *arguments, **options):
    calls.append(len(arguments))
    options |= {"implementation": "mosaic_tpu", "interpret": pltpu.InterpretParams()}
    return paged_attention(*arguments, config=PagedTpuConfig(block_q=64, block_k=128), **options)


@pytest.mark.slow
@pytest.mark.parametrize("lay", [in_rows, packed])
def test_steps_of_many_tokens(lay, monkeypatch):
    params, calls = init_params(CONFIG, jax.random.key(1)), []
    plain = hidden_states(params, lay)
    for module in (layer, ring):
        attend = functools.partial(through_the_kernel, calls)
        monkeypatch.setattr(module, "paged_attention", attend)
    jax.clear_caches()  # of layers that were traced
    ours = hidden_states(params, lay)
    jax.clear_caches()
    assert len(calls) == len(CONFIG.layers)
    assert abs(ours - plain).max() < 1e-5 * abs(plain).max()


@pytest.mark.absent_tpu
@pytest.mark.parametrize(("heads", "kv"), [(1, "int8"), (2, "int8"), (1, "int4")])
def test_xla_writes_a_chunk_in_place(heads, kv):
    """To a row whose pages, with the null page, are no multiple of a vector's 8 rows."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 128}
    config = dataclasses.replace(CONFIG, layers=layer_kinds(1, nope_interval=1), **sizes)

    def write(cache, k, v, index):
        return cache._replace(layers=tuple(x.write(k, v, index) for x in cache.layers))

    mesh = mesh_of(absent_tpus("v5p:2x2x1")[0])
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    shaped = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 7813 * PAGE, kv))
    cache = jax.tree.map(lambda x: shaped(x.shape, x.dtype), cache)
    new, index = shaped((1, heads, 8192, 128), jnp.bfloat16), shaped((1, 8192), jnp.int32)
    compiled = jax.jit(write, donate_argnums=0).lower(cache, new, new, index).compile()
    program = Program(compiled.as_text(), {}, 1.0, Core.of("v5p", 2, 1.0, 1.0))
    assert len(program.operations) > 3 and program.pool_copies == 0
