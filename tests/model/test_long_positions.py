"""Exact at ten million tokens: positions are data, and no float32 angle ever sees a large one."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import SCOUT, LayerKind
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.model.layers import temperature
from tests import reference

LAST = 10_485_759  # of a context of 10,485,760
LENGTH = 40


def positions(start):
    return np.arange(start, start + LENGTH, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def tokens(small):
    return np.random.default_rng(3).integers(0, small.config.vocab_size, (1, LENGTH), np.int32)


@pytest.mark.parametrize("decode_from", [None, 20], ids=["forward", "decode"])
def test_local_layers_repeat_every_chunk(small, tokens, decode_from):
    """The same tokens at the same place in a chunk have the same logits, to the last bit."""
    local = [i for i, kind in enumerate(small.config.layers) if kind.attention == "local"]
    config = dataclasses.replace(
        small.config,
        layers=tuple(LayerKind("local", "moe") for _ in local),
        max_position_embeddings=LAST + 1,
    )
    params = {**small.params, "layers": [small.params["layers"][i] for i in local]}
    far = LAST - LENGTH + 1
    assert far // 16 * 16 + 16 < LAST  # a chunk edge lies within
    run = [
        token_logits(config, params, tokens, positions=positions(start), decode_from=decode_from)
        for start in (far % 16, far)
    ]
    np.testing.assert_array_equal(*run)


def test_whole_model_near_the_end_of_the_context(small, tokens):
    """Against float64, where absolute rotary angles still are exact."""
    where = positions(LAST - LENGTH + 1)
    expected = reference.logits(
        small.hf_config, small.tensors, tokens, positions=where.astype(np.int64)
    )
    config = dataclasses.replace(small.config, max_position_embeddings=LAST + 1)
    for path in ({}, {"decode_from": 20}):
        ours = token_logits(config, small.params, tokens, positions=where, **path)
        assert abs(ours - expected).max() < 1e-4


def test_temperature_at_every_chunk_edge():
    edges = np.arange(1, LAST // 8192 + 2) * 8192
    where = np.unique(np.concatenate([edges - 2, edges - 1, edges, [0, LAST]]))
    where = where[where <= LAST].astype(np.int32)
    expected = [1 + 0.1 * math.log((p + 1) // 8192 + 1) for p in where.tolist()]
    np.testing.assert_allclose(temperature(SCOUT, jnp.asarray(where[None]))[0], expected, rtol=2e-7)


@pytest.mark.parametrize(
    "position, scale",
    [(8190, 1.0), (8191, 1.069315), (16383, 1.109861), (1048575, 1.485981), (LAST, 1.715540)],
)
def test_temperature_values(position, scale):
    ours = temperature(SCOUT, jnp.array([[position]]))[0, 0]
    assert abs(float(ours) - scale) < 1e-6


def test_a_position_past_the_context_is_refused(small, tokens):
    with pytest.raises(UserError, match="position 10485759 is past the model's context of 4096"):
        token_logits(small.config, small.params, tokens, positions=positions(LAST - LENGTH + 1))
