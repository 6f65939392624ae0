"""Log-probabilities against float64, sharded and a slice of the prompt at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.generation.sampling import NO_TOKEN
from jaxmoe.generation.vocab_logprobs import logprobs, prompt_logprobs
from jaxmoe.mesh import MeshConfig

SIZE, WIDTH = 101, 8
of_tokens = jax.jit(logprobs, static_argnames="top")


def reference(logits):
    logits = np.asarray(logits, np.float64)
    above = logits - logits.max(-1, keepdims=True)
    return above - np.log(np.exp(above).sum(-1, keepdims=True))


def check(found, logits, tokens, top):
    want = reference(logits)
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :top]
    np.testing.assert_array_equal(found.top_ids, order)
    taken = np.take_along_axis(want, order, axis=-1)
    np.testing.assert_allclose(found.top_logprobs, taken, rtol=3e-7, atol=3e-7)
    got = want[np.arange(len(want)), tokens]
    np.testing.assert_allclose(found.logprob, np.where(tokens < 0, np.nan, got), rtol=3e-7)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_are_those_of_float64(offset, top):
    """Logits with ties, whose lower ids come first."""
    rng = np.random.default_rng(top)
    logits = (rng.integers(-40, 40, (6, SIZE)) / 4 + offset).astype(np.float32)
    tokens = rng.integers(0, SIZE, 6).astype(np.int32)
    check(of_tokens(jnp.asarray(logits), jnp.asarray(tokens), top=top), logits, tokens, top)


def test_a_large_vocabulary_loses_nothing():
    """A sum of 200,000 equal numbers in float32, one after another, would be off by 1e-3."""
    logits = np.zeros((1, 202_048), np.float32)
    logits[0, 7] = 1e-3
    found = of_tokens(jnp.asarray(logits), jnp.array([8]), top=2)
    check(found, logits, np.array([8]), 2)


@pytest.mark.parametrize("mesh", [None, "tensor=8", "data=2,tensor=4"])
def test_a_prompt_is_taken_in_slices(mesh):
    """Slices of 6 tokens do not divide 20; a token without a target still has its largest."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((20, WIDTH)).astype(np.float32)
    head = rng.standard_normal((WIDTH, SIZE)).astype(np.float32)
    targets = rng.integers(0, SIZE, 20).astype(np.int32)
    targets[19] = NO_TOKEN
    seen = []

    def logits_of(hidden):
        seen.append(hidden.shape)
        return jnp.dot(hidden, head, precision="highest")

    def run(hidden, targets):
        return prompt_logprobs(logits_of, hidden, targets, 3, size=6)

    if mesh:
        with jax.set_mesh(MeshConfig.parse(mesh).make()):
            found = jax.jit(run)(hidden, targets)
    else:
        found = run(jnp.asarray(hidden), jnp.asarray(targets))
    assert set(seen) == {(6, WIDTH)}
    want = reference(hidden.astype(np.float64) @ head)
    np.testing.assert_allclose(found.logprob[:19], want[np.arange(19), targets[:19]], rtol=1e-5)
    assert np.isnan(found.logprob[19]) and found.top_ids.shape == (20, 3)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-want, axis=-1)[:, :3])


@pytest.mark.reads_compiled
def test_memory_is_that_of_a_slice():
    hidden, head = jnp.zeros((1024, WIDTH)), jnp.zeros((WIDTH, 4096))

    def run(size):
        program = jax.jit(
            lambda hidden, targets: prompt_logprobs(
                lambda x: x @ head, hidden, targets, 5, size=size
            )
        )
        lowered = program.lower(hidden, jnp.zeros(1024, jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert run(64) < 1024 * 4096 * 4 / 2 < run(1024)


def test_a_token_that_is_not_finite_spoils_its_own_numbers_only():
    logits = np.random.default_rng(0).standard_normal((3, SIZE)).astype(np.float32)
    tokens = jnp.array([4, 5, 6])
    want = of_tokens(jnp.asarray(logits), tokens, top=2)
    logits[1, 50] = np.nan
    found = of_tokens(jnp.asarray(logits), tokens, top=2)
    assert np.isnan(found.logprob).tolist() == [False, True, False]
    assert found.top_ids[1].tolist() == [NO_TOKEN, NO_TOKEN]
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one[jnp.array([0, 2])], other[jnp.array([0, 2])])
