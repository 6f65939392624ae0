"""Padded and packed batches by every path against the NumPy reference, where transformers errs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.evaluate import token_logits
from tests import reference

LENGTH = 61  # three chunks of 16 and a bit


def batch(vocab):
    """Rows: plain, left-padded, packed and right-padded, packed in many small segments."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, vocab, (4, LENGTH), np.int32)
    segments = np.ones((4, LENGTH), np.int32)
    segments[1, :19] = 0
    segments[2, 20:55], segments[2, 55:] = 2, 0
    segments[3] = 1 + np.arange(LENGTH) // 9
    return tokens, segments


@pytest.fixture(scope="module")
def expected(small):
    tokens, segments = batch(small.config.vocab_size)
    logits = reference.logits(small.hf_config, small.tensors, tokens, segments)
    return tokens, segments, np.where(segments[..., None] == 0, 0, logits)


@pytest.mark.parametrize(
    "path",
    [
        {},
        {"prefill_segment": LENGTH},
        {"prefill_segment": 16},
        {"prefill_segment": 13},
        {"decode_from": 40},
        {"decode_from": 40, "prefill_segment": 24},
        {"decode_from": 0},
    ],
    ids=["forward", "one segment", "chunks", "13 at a time", "decode", "segments+decode", "tokens"],
)
def test_matches_reference(small, expected, path):
    tokens, segments, logits = expected
    ours = token_logits(small.config, small.params, tokens, segments, **path)
    assert abs(ours - logits).max() < 1e-4


def test_left_padding_changes_nothing(small, expected):
    tokens, _, _ = expected
    plain = token_logits(small.config, small.params, tokens[:1, 5:])
    segments = np.ones((1, LENGTH), np.int32)
    segments[:, :5] = 0
    padded = token_logits(small.config, small.params, tokens[:1], segments)
    assert abs(padded[:, 5:] - plain).max() < 1e-5


def test_packing_changes_nothing(small, expected):
    tokens, segments, _ = expected
    packed = token_logits(small.config, small.params, tokens, segments)
    alone = token_logits(small.config, small.params, tokens[2:3, 20:55])
    assert abs(packed[2, 20:55] - alone[0]).max() < 1e-5


def test_bfloat16_follows_the_reference(small, expected):
    """Rounding, and now and then a token whose expert flips, but the same likeliest token."""
    tokens, segments, logits = expected
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params)
    ours = token_logits(small.config, params, tokens, segments, decode_from=40)
    real = segments != 0
    error = abs(ours - logits)[real].max(-1)
    assert np.median(error) < 0.1
    assert np.mean(ours.argmax(-1)[real] == logits.argmax(-1)[real]) > 0.85
