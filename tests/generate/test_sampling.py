"""Sampling: how often each token is taken, whatever the other rows of the batch are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation.sampler import Choice, Draws, choose
from jaxmoe.generation.sampling import NO_TOKEN, Sampling, request_hash

CHI_SQUARE_999 = {3: 16.27, 15: 37.70}  # exceeded once in 1000 by chance; degrees of freedom
QUARTERS = [0.0, 0.0, 0.0, 0.0]  # four tokens of probability exactly 1/4
LOGITS = np.log(np.array([0.4, 0.1, 0.3, 0.2], np.float32))


run = jax.jit(choose)


def draws_of(sampling, request, index):
    def column(value, dtype=jnp.float32):
        return jnp.broadcast_to(jnp.asarray(value, dtype), len(request))

    return Draws(
        seed=column(sampling.seed, jnp.int32),
        request=column(request, jnp.uint32),
        index=column(index, jnp.int32),
        temperature=column(sampling.temperature),
        top_k=column(sampling.top_k, jnp.int32),
        top_p=column(sampling.top_p),
    )


def sample(sampling, logits, request, index):
    """A token for each row."""
    return run(jnp.asarray(logits), Choice(draws_of(sampling, request, index))).token


def drawn(sampling, logits, request, index):
    """Tokens of rows that share `logits`; `request` and `index` broadcast."""
    request, index = np.broadcast_arrays(np.asarray(request, np.uint32), np.asarray(index))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(request), len(logits)))
    return np.asarray(sample(sampling, rows, request, index))


def assert_frequencies(counts, probabilities):
    """Pearson's test of counts against probabilities, none of them zero."""
    counts, expected = np.ravel(counts), np.sum(counts) * np.ravel(probabilities)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_999[counts.size - 1]


def test_top_p_sees_the_probabilities_after_temperature():
    """At temperature 4 the first token's share falls below one half, so a second one is kept."""
    logits = np.log([0.75, 0.15, 0.1])
    requests = np.arange(2000)
    assert set(drawn(Sampling(temperature=1.0, top_p=0.5), logits, requests, 0)) == {0}
    assert set(drawn(Sampling(temperature=4.0, top_p=0.5), logits, requests, 0)) == {0, 1}


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    logits = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [-9.0, -9.5, -8.0]])
    rows = jnp.arange(3, dtype=jnp.uint32), jnp.zeros(3, jnp.int32)
    tokens = sample(Sampling(temperature=0.0, top_p=0.01), logits, *rows)
    assert tokens.tolist() == [1, 0, 2]
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    """The tokens of many requests, each drawn once."""
    tokens = drawn(Sampling(temperature=temperature, top_p=1.0), LOGITS, np.arange(20_000), 0)
    weights = np.exp(LOGITS / temperature)
    assert_frequencies(np.bincount(tokens, minlength=4), weights / weights.sum())


def test_what_is_kept_keeps_its_proportions():
    logits = np.append(LOGITS, [-4.0, -5.0])  # left out by top-k
    tokens = drawn(Sampling(temperature=1.0, top_p=1.0, top_k=4), logits, np.arange(20_000), 0)
    assert tokens.max() < 4
    assert_frequencies(np.bincount(tokens, minlength=4), np.exp(LOGITS))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((0, 0, 0), (1, 0, 0)),
        ((0, 0, 0), (0, 1, 0)),
        ((0, 0, 0), (0, 0, 1)),
        ((1, 0, 0), (0, 1, 0)),
        ((0, 1, 0), (0, 0, 1)),  # catches a sum of request and index
    ],
)
def test_draws_do_not_depend_on_one_another(one, two):
    """Pairs of draws whose (seed, request, index) differ are independent."""

    def draw(seed, request, index):
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        return drawn(sampling, LOGITS, 2 * np.arange(20_000) + request, 7 + index)

    pairs = np.histogram2d(draw(*one), draw(*two), bins=(4, 4))[0]
    assert_frequencies(pairs, np.outer(np.exp(LOGITS), np.exp(LOGITS)))


def test_tokens_of_one_request_follow_the_probabilities():
    """Catches an index that does not reach the random numbers."""
    tokens = drawn(
        Sampling(temperature=1.0, top_p=1.0), LOGITS, request_hash("a"), np.arange(20_000)
    )
    assert_frequencies(np.bincount(tokens, minlength=4), np.exp(LOGITS))


def test_neighbours_and_row_order_do_not_matter():
    rng, sampling = np.random.default_rng(0), Sampling(temperature=1.0, top_p=0.95, top_k=40)
    logits = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)
    request = jnp.array([request_hash(f"request {i}") for i in range(16)])
    index = jnp.asarray(rng.integers(0, 100, 16), jnp.int32)
    together = sample(sampling, logits, request, index)
    order = rng.permutation(16)
    turned = sample(sampling, logits[order], request[order], index[order])
    np.testing.assert_array_equal(turned, together[order])
    for i in (0, 9):
        alone = sample(sampling, *(x[i : i + 1] for x in (logits, request, index)))
        assert alone.tolist() == [together[i]]


def test_the_hash_of_an_id_is_stable():
    """Python's own hash of a string changes from run to run. The number is CRC-32's check value."""
    assert request_hash("123456789") == 0xCBF43926
    assert request_hash(123456789) == 0xCBF43926


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_gives_no_token(temperature):
    """Catches one NaN among many numbers, which a maximum may drop."""
    logits = np.random.default_rng(0).standard_normal((5, 1000), np.float32)
    logits[1, 500], logits[2, 3], logits[3, 999] = np.nan, np.inf, -np.inf
    sampling = Sampling(temperature=temperature)
    tokens = sample(sampling, logits, np.zeros(5, np.uint32), np.zeros(5, np.int32))
    assert [token == NO_TOKEN for token in tokens] == [False, True, True, True, False]
