"""Padded and packed batches by every path against the NumPy reference, where transformers errs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.transformer import positions_of
from tests import reference, tiny
from tests.conftest import load_tiny

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
        {"prefill_chunk": LENGTH},
        {"prefill_chunk": 16},
        {"prefill_chunk": 13},
        {"decode_from": 40},
        {"decode_from": 40, "prefill_chunk": 24},
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


VARIANTS = {
    "no chunks": {"attention_chunk_size": None},
    "tied embeddings": {"tie_word_embeddings": True},
    "no experts": {"moe_layers": []},
    "local layers only": {"no_rope_layers": [1, 1]},
    "global layers only, two experts a token": {
        "no_rope_layers": [0, 0],
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_other_configurations(variant, tmp_path):
    """Through the cache on a mesh: segments, then single tokens."""
    config = tiny.scout_like(num_hidden_layers=2, **variant)
    tensors = tiny.random_tensors(config, 4)
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = load_tiny(tmp_path, config, tensors)
    tokens, segments = batch(model.config.vocab_size)
    expected = reference.logits(config, tensors, tokens, segments)
    mesh = MeshConfig.parse("expert=2,sequence=2,tensor=2").make()
    with jax.set_mesh(mesh):
        path = {"prefill_chunk": 24, "decode_from": 50}
        ours = token_logits(model.config, model.on(mesh), tokens, segments, **path)
    assert abs(ours - np.where(segments[..., None] == 0, 0, expected)).max() < 1e-4


def test_positions_count_through_padding():
    segments = jnp.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 1, 1, 0, 0, 0]])
    expected = [[0, 0, 1, 0, 2, 0, 1, 0], [0, 1, 2, 0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(positions_of(segments), expected)
