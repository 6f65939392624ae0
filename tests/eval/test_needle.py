"""Needles lie where they were asked for, and one answer comes of every path."""

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.eval.logits import greedy_answer, last_logits
from jaxmoe.eval.needle import HAYSTACK, NEEDLE, QUESTION, is_found, make_needle, random_key
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer
from tests import reference

LENGTH = 300
KEY = "71432"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("demo/needle/model")


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.array(tokenizer.encode(HAYSTACK))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_needle_lies_at_its_depth(tokenizer, haystack, depth):
    made = make_needle(tokenizer, haystack, KEY, LENGTH, depth)
    assert len(made.prompt) + made.room == LENGTH
    needle, question = tokenizer.encode(NEEDLE.format(key=KEY)), tokenizer.encode(QUESTION)
    assert list(made.prompt[made.start : made.start + len(needle)]) == needle
    assert list(made.prompt[-len(question) :]) == question
    assert made.prompt[0] == tokenizer.bos_id
    filler = LENGTH - 1 - len(needle) - len(question) - made.room
    assert made.start - 1 == round(depth * filler)
    rest = np.delete(np.array(made.prompt), np.arange(made.start, made.start + len(needle)))
    np.testing.assert_array_equal(rest[1 : 1 + filler], np.resize(haystack, filler))


def test_a_length_without_room_is_refused(tokenizer, haystack):
    shortest = LENGTH
    with pytest.raises(UserError, match="too short"):
        while True:
            made = make_needle(tokenizer, haystack, KEY, shortest, 0.5)
            assert len(made.prompt) + made.room == shortest
            shortest -= 1
    assert shortest == 1 + 11 + 10 + made.room  # begin, needle and question


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (" 71432.", True),
        ("It is 71432, I think", True),
        (" 71433.", False),
        (" 714325.", False),
        (" 171432.", False),
        (" 7 1432", False),
        ("", False),
    ],
)
def test_only_the_very_digits_are_found(answer, want):
    assert is_found(KEY, answer) == want


def test_keys_have_all_their_digits():
    rng = np.random.default_rng(0)
    for digits in (1, 5):
        keys = [random_key(rng, digits) for _ in range(200)]
        assert all(len(key) == digits and key[0] != "0" and key.isdecimal() for key in keys)
        assert {key[-1] for key in keys} >= set("123456789")


@pytest.fixture(scope="module")
def prompt(small):
    return np.random.default_rng(3).integers(0, small.hf_config["vocab_size"], 45).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 16, 64])  # ends within a chunk; a chunk; more than there is
def test_an_answer_is_that_of_float64(small, prompt, chunk):
    answer = greedy_answer(small.config, small.params, prompt, 6, prefill_chunk=chunk)
    tokens = np.array([[*prompt, *answer.tokens]])
    want = reference.logits(small.hf_config, small.tensors, tokens)[0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(answer.logits, want, rtol=0, atol=1e-4)
    assert list(answer.tokens) == want.argmax(-1).tolist()
    whole = last_logits(small.config, small.params, tokens[0, :-1].tolist(), 6)
    np.testing.assert_allclose(whole, want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_answer_is_the_engines(small, prompt):
    stream = generate(
        small.config,
        small.params,
        [Request("0", tuple(prompt), 6)],
        Sampling(temperature=0.0),
        stop_ids=(),
    )
    tokens = [token.token for token in stream]
    read = []
    answer = greedy_answer(
        small.config,
        small.params,
        prompt,
        6,
        prefill_chunk=16,
        stop_ids=tokens[3:4],
        report=read.append,
    )
    assert list(answer.tokens) == tokens[: tokens.index(tokens[3]) + 1]
    assert len(answer.logits) == len(answer.tokens)
    assert sum(read) == len(prompt) + len(answer.tokens) - 1  # the last one is not read


def test_an_answer_must_fit_the_context(small):
    most = small.config.max_position_embeddings
    with pytest.raises(UserError, match=str(most)):
        greedy_answer(small.config, small.params, [1] * (most - 1), 2)
    with pytest.raises(UserError, match=str(most)):
        last_logits(small.config, small.params, [1] * (most + 1), 2)
