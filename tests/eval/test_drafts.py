"""Acceptance against NumPy's chains one by one; heads that read other layers are told of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.heads import Head
from jaxmoe.eagle_config import eagle_from_hf
from jaxmoe.errors import UserError
from jaxmoe.eval.drafts import LOW, measure, other_layer_ids, warning_of
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.eagle import abstract_eagle
from tests import reference
from tests.conftest import one_device
from tests.eagle import Head as PlainHead
from tests.eagle import head_config, head_tensors, plain_params, target_ids

COUNT = 3


def loaded(model, mesh, mapping, tensors):
    config, _ = eagle_from_hf(mapping, "head", model.config)
    params = jax.tree.map(
        lambda x, like: jax.device_put(jnp.asarray(x, jnp.float32), like.sharding),
        plain_params(mapping, tensors),
        abstract_eagle(config, mesh, jnp.float32),
    )
    return Head(config, params, jnp.asarray(target_ids(tensors), jnp.int32))


def echo_head(model):
    """A head whose guess is what the target says of the state that it reads, if it reads it last.

    Of two layers the state after the last gives the target's own logits at the token before; so
    the texts repeat each token, and the guess is right.
    """
    mapping = head_config(draft_vocab_size=128)
    tensors = {name: 0 * x for name, x in head_tensors(mapping, 5).items()}
    tensors["fc.weight"][:, :64] = np.eye(64)
    tensors["norm.weight"] = model.tensors["model.norm.weight"]
    tensors["lm_head.weight"] = model.tensors["lm_head.weight"]
    return mapping, tensors


def text(rows=2, length=12):
    return np.random.default_rng(3).integers(0, 120, (rows, length), np.int32)


def numpy_accepted(model, mapping, tensors, tokens, layer_ids, temperature):
    """The share of chains of which so many tokens are accepted, each chain by itself."""
    wide = {name: x.astype(np.float64) for name, x in model.tensors.items()}
    logits = reference.logits(model.hf_config, model.tensors, tokens)
    streams = list(reference.streams(model.hf_config, wide, tokens, np.ones_like(tokens)))
    states = np.concatenate([streams[i] for i in layer_ids], axis=-1)
    found = []
    for row in range(len(tokens)):
        for t in range(tokens.shape[1] - COUNT):
            head = PlainHead(mapping, tensors, wide["model.embed_tokens.weight"])
            read, forced = tokens[row, 1 : t + 2], tokens[row, t + 2 :]
            guesses, _ = head.draft(read, states[row, : t + 1], COUNT, forced=forced)
            shares = []
            for n, guess in enumerate(guesses):
                said = logits[row, t + 1 + n]
                p = np.exp((said - said.max()) / (temperature or 1.0))
                share = p[guess] / p.sum() if temperature else float(said.argmax() == guess)
                shares.append(share)
            found.append(np.cumprod(shares))
    return np.mean(found, axis=0)


def near_head(model):
    """A random head of whose guesses some are accepted: its last matrix is the target's."""
    mapping = head_config(draft_vocab_size=128)
    tensors = head_tensors(mapping, 5)
    tensors["lm_head.weight"] = model.tensors["lm_head.weight"]
    tensors["fc.weight"] = 3 * np.hstack([np.eye(64)] * 3).astype(np.float32)
    return mapping, tensors


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2,sequence=2"])
def test_acceptance_is_that_of_chains_one_by_one(small, mesh):
    """Guesses held against another place's logits, or along another path, would differ."""
    mapping, tensors = near_head(small)
    mesh = one_device() if mesh is None else MeshConfig.parse(mesh).make()
    head, tokens = loaded(small, mesh, mapping, tensors), text()
    with jax.set_mesh(mesh):
        found = measure(small.config, small.on(mesh), head, tokens, [0.0, 0.7], COUNT)
    assert found[0].accepted[0] > 0
    for one in found:
        wanted = numpy_accepted(small, mapping, tensors, tokens, (2, 1, 0), one.temperature)
        np.testing.assert_allclose(one.accepted, wanted, rtol=1e-3, atol=1e-7)
        assert one.tokens_per_step == pytest.approx(1 + sum(wanted), rel=1e-3)
        assert one.chains == 2 * (12 - COUNT)


def test_on_what_the_target_writes_it_is_what_drafting_shows(small):
    """Chains that follow their own guesses, held against what the target writes, greedily.

    A token's own embedding makes a share of its successor's logits, so that the target repeats
    itself at times, and the head always.
    """
    embed, last = (small.tensors[x] for x in ("model.embed_tokens.weight", "lm_head.weight"))
    last = last + 0.35 * last.std() / embed.std() * embed
    plain = {**small.tensors, "lm_head.weight": last}
    mapping, tensors = near_head(small)
    tensors["lm_head.weight"], tensors["fc.weight"] = embed, tensors["fc.weight"] / 3
    tokens = np.array([[3], [70]])
    for _ in range(13):
        logits = reference.logits(small.hf_config, plain, tokens)
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    wide = {name: x.astype(np.float64) for name, x in plain.items()}
    streams = list(reference.streams(small.hf_config, wide, tokens, np.ones_like(tokens)))
    states, found = np.concatenate([streams[i] for i in (2, 1, 0)], axis=-1), []
    for row in range(2):
        for t in range(len(tokens[0]) - 1 - COUNT):  # the token after the last guess is there
            head = PlainHead(mapping, tensors, embed)
            guesses, _ = head.draft(tokens[row, 1 : t + 2], states[row, : t + 1], COUNT)
            found.append(np.cumprod(guesses == tokens[row, t + 2 : t + 2 + COUNT]))
    with jax.set_mesh(one_device()):
        params = small.params | {"lm_head": jnp.asarray(last.T)}
        head, rows = loaded(small, one_device(), mapping, tensors), tokens[:, :-1]
        (one,) = measure(small.config, params, head, rows, [0.0], COUNT)
    assert 0 < one.accepted[-1] < one.accepted[0] < 1
    np.testing.assert_allclose(one.accepted, np.mean(found, axis=0), rtol=1e-6)


def test_a_head_that_reads_other_layers_is_told_of(small):
    """It was made for the outputs of layers that it is given the inputs of.

    The last layer counts for more than in the tiny model, so that the stream before it says little.
    """
    mapping, tensors = echo_head(small)
    tokens = np.repeat(text(4, 8), 4, axis=1)
    before, last = small.params["layers"]
    last = last | {"feed_forward": jax.tree.map(lambda w: 3 * w, last["feed_forward"])}
    params = small.params | {"layers": [before, last]}
    with jax.set_mesh(one_device()):
        head = loaded(small, one_device(), mapping, tensors)

        def judged(ids):
            reads = head._replace(config=dataclasses.replace(head.config, layer_ids=ids))
            found = measure(small.config, params, reads, tokens, [0.0], 1)
            return found, warning_of(small.config, params, reads, tokens, found)

        right, none = judged((2, 1, 1))
        wrong, warning = judged((1, 0, 0))
    assert (right[0].accepted[0] > 2 * LOW, wrong[0].accepted[0] < LOW) == (True, True)
    assert none is None
    assert "with those of 2,1,1: convert the head again with --layer-ids 2,1,1" in warning


def test_a_head_of_another_model_is_told_of(small):
    mapping = head_config()
    head = loaded(small, one_device(), mapping, head_tensors(mapping, 5))
    with jax.set_mesh(one_device()):
        found = measure(small.config, small.params, head, text(), [0.0, 1.0], 1)
        warning = warning_of(small.config, small.params, head, text(), found)
    assert "no more with its neighbours: the head was trained for another model" in warning


def test_the_layers_that_may_be_meant(small):
    config, _ = eagle_from_hf(head_config(), "head", small.config)
    assert other_layer_ids(config, 2) == []
    assert other_layer_ids(dataclasses.replace(config, layer_ids=(2, 4, 5)), 8) == [
        (3, 5, 6),
        (1, 3, 4),
    ]
    shifted = dataclasses.replace(config, layer_ids=(1, 3, 4))
    assert other_layer_ids(shifted, 8) == [(2, 4, 5), (0, 2, 3)]


def test_texts_that_cannot_be_measured(small):
    mapping = head_config()
    head = loaded(small, one_device(), mapping, head_tensors(mapping, 5))
    with pytest.raises(UserError, match="too short for chains of 11"):
        measure(small.config, small.params, head, text(), [0.0], 11)
    with pytest.raises(UserError, match="outside the vocabulary"):
        measure(small.config, small.params, head, text() + 100, [0.0], 2)
