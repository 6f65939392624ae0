"""What ends an answer: compared with references that look at the whole answer at each token."""

import codecs
import itertools
import math

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, decoders, models

from jaxmoe.errors import UserError
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.request import ERROR, Request
from jaxmoe.generation.sampling import NO_TOKEN, RepetitionDetection, Sampling
from jaxmoe.generation.stopping import RepetitionWatch, StopStrings
from jaxmoe.text import Tokenizer
from jaxmoe.text.meta_vocabulary import BYTE_CHARS
from tests.small_tokenizers import byte_tokenizer

quick = settings(max_examples=400, deadline=None, derandomize=True)
BASE = "abba\u00e9\u65e5\U0001f389aab"  # characters of one to four bytes


def pieces_tokenizer() -> Tokenizer:
    """Tokens that begin and end anywhere in `BASE`, inside characters too; every byte; <|eot|>."""
    raw = BASE.encode()
    pieces = {raw[i:j] for i, j in itertools.combinations(range(len(raw) + 1), 2) if j - i <= 6}
    tokens = sorted({bytes([byte]) for byte in range(256)} | pieces)
    vocab = {"".join(BYTE_CHARS[byte] for byte in token): i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|eot|>", special=True)])
    return Tokenizer(backend)


TOKENIZER = pieces_tokenizer()
EOT = TOKENIZER.special("<|eot|>")
IDS = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
# Pieces of the base, several times as likely as any other byte.
PIECES = [i for raw, i in IDS.items() if raw and raw in BASE.encode()]
tokens = some.lists(some.sampled_from(PIECES) | some.integers(0, EOT), min_size=1, max_size=20)
stops = some.lists(some.text(alphabet=BASE, min_size=1, max_size=4), max_size=3).map(tuple)


def complete_text(ids):
    """The characters of some tokens that are complete."""
    raw = b"".join(TOKENIZER.token_bytes(i) for i in ids)
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(raw)


def reference(ids, stops, *, include, min_tokens):
    """Text, tokens kept, stop string and tokens used, by decoding and searching all of it."""
    for count in range(1, len(ids) + 1):
        before, text = (complete_text(ids[:n]) for n in (count - 1, count))
        found = [
            (start + len(stop), order, stop)
            for order, stop in enumerate(stops)
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(before)
        ]
        if found and count > min_tokens:
            end, _, stop = min(found)
            text = text[: end if include else end - len(stop)]
            kept = max(n for n in range(count + 1) if len(TOKENIZER.decode(ids[:n])) <= len(text))
            return text, ids[:kept], stop, count
    return TOKENIZER.decode(ids), ids, None, len(ids)


def completion(ids, *, end_ids=(), tokenizer=TOKENIZER, **settings):
    """The completion of an answer, what it showed at each token, and how much it had used."""
    request = Request("a", (1, 2), len(ids))
    answer, shown = Completion(request, Sampling(**settings), end_ids, tokenizer), []
    for index, token in enumerate(ids):
        shown.append(answer.push(token, -float(index), [(token, -float(index)), (0, -math.inf)]))
        if answer.finish_reason:
            break
    return answer, shown


@quick
@given(tokens, stops, some.booleans(), some.integers(0, 3))
def test_text_tokens_and_logprobs_are_cut_at_the_first_stop_string(ids, stops, include, least):
    text, kept, stop, used = reference(ids, stops, include=include, min_tokens=least)
    answer, shown = completion(
        ids, stop=stops, include_stop_in_output=include, min_tokens=least, logprobs=1
    )
    record = answer.record()
    assert "".join(shown) == record["text"] == text
    assert record["tokens"] == kept
    assert [one["logprob"] for one in record["logprobs"]["content"]] == [
        -float(i) for i in range(len(kept))
    ]
    assert record.get("stop_reason") == stop
    assert record["finish_reason"] == ("length" if stop is None else "stop")
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": used}


@quick
@given(tokens, stops)
def test_only_what_may_become_a_stop_string_is_held_back(ids, stops):
    """Catches text that is shown too early, and text that is held for longer than it must be."""
    _, shown = completion(ids, stop=stops)
    for count in range(1, len(shown)):
        text = complete_text(ids[:count])
        begun = [
            size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])
        ]
        assert "".join(shown[:count]) == text[: len(text) - max(begun, default=0)]


@quick
@given(some.text(alphabet="ab", max_size=12), some.text(alphabet="ab", min_size=1, max_size=5))
def test_a_stop_string_that_overlaps_itself_is_found(text, stop):
    """As `aab` in `aaab`: a search that begins anew after a mismatch misses it."""
    match = StopStrings((stop,)).push(text)
    assert (match.end if match else -1) == (text.find(stop) + len(stop) if stop in text else -1)


def test_the_earliest_completed_wins_and_of_two_the_first_listed():
    ids = [IDS[b"a"], IDS[b"bb"], IDS[b"a"]]
    assert completion(ids, stop=("bba", "ab"))[0].stop_reason == "ab"
    assert completion(ids, stop=("bb", "b", "abb"))[0].stop_reason == "b"
    assert completion(ids, stop=("abb", "bb"))[0].stop_reason == "abb"
    assert completion(ids, stop=("bb", "abb"))[0].stop_reason == "bb"


def test_a_stop_string_ends_no_answer_that_is_too_short():
    ids = [IDS[b"a"], IDS[b"b"], IDS[b"b"], IDS[b"a"], IDS[b"b"]]
    answer, shown = completion(ids, stop=("ab",), min_tokens=2)
    assert (answer.text, answer.stop_reason, answer.count) == ("abb", "ab", 5)
    assert shown == ["", "ab", "b", "", ""]
    answer, _ = completion([IDS[b"a"]] * 3, stop=("aa",), min_tokens=2)
    assert (answer.text, answer.count) == ("a", 3)  # it overlaps one that came too early


def test_the_models_stop_tokens_are_kept_and_have_no_text():
    ids = [IDS[b"a"], EOT, IDS[b"b"]]
    answer, _ = completion(ids, end_ids=(EOT,))
    assert (answer.text, answer.tokens, answer.finish_reason) == ("a", ids[:2], "stop")
    assert "stop_reason" not in answer.record()
    for other in ({"ignore_eos": True}, {"min_tokens": 2}):
        answer, _ = completion(ids, end_ids=(EOT,), **other)
        assert (answer.text, answer.tokens, answer.finish_reason) == ("ab", ids, "length")


def test_a_stop_token_of_the_request_goes_unless_it_is_asked_for():
    ids = [IDS[b"a"], IDS[b"b"], IDS[b"a"]]
    answer, _ = completion(ids, stop_ids=(IDS[b"b"],), logprobs=0)
    assert (answer.text, answer.tokens, answer.stop_reason) == ("a", ids[:1], IDS[b"b"])
    assert len(answer.record()["logprobs"]["content"]) == 1
    answer, _ = completion(ids, stop_ids=(IDS[b"b"],), include_stop_in_output=True)
    assert (answer.text, answer.tokens, answer.stop_reason) == ("ab", ids[:2], IDS[b"b"])
    answer, _ = completion(ids, stop_ids=(IDS[b"b"],), min_tokens=2)
    assert answer.finish_reason == "length"
    answer, _ = completion(ids, stop_ids=(IDS[b"b"],), tokenizer=None)
    assert (answer.text, answer.tokens) == ("", ids[:1])


def test_a_text_that_is_held_appears_when_the_answer_ends_otherwise():
    answer, shown = completion([IDS[b"a"], IDS[b"b"], EOT], end_ids=(EOT,), stop=("abba",))
    assert shown == ["", "", "ab"] and answer.text == "ab"


def test_half_a_character_appears_only_at_the_end():
    answer, shown = completion([IDS[b"a"], IDS[b"\xe6\x97"], EOT], end_ids=(EOT,))
    assert shown == ["a", "", "\ufffd"] and answer.text == "a\ufffd"


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(UserError, match="stop strings, but there is no tokenizer"):
        completion([1], tokenizer=None, stop=("a",))


def test_logits_that_are_not_finite_are_an_error():
    answer, shown = completion([IDS[b"a"], NO_TOKEN], stop=("ab",))
    record = answer.record()
    assert shown == ["", "a"] and record["text"] == "a" and record["tokens"] == [IDS[b"a"]]
    assert record["finish_reason"] == ERROR
    assert "logits after 1 new tokens are not finite" in record["error"]


def repeats(ids, least, most, count):
    """As vLLM defines it."""
    return any(
        len(ids) >= size * count and ids[-size * count :] == ids[len(ids) - size :] * count
        for size in range(least, most + 1)
    )


@quick
@given(
    some.lists(some.integers(0, 1) | some.integers(0, 3), max_size=40),
    some.integers(1, 5),
    some.integers(0, 5),
    some.integers(2, 4),
)
def test_repetition_is_what_it_is_in_vllm(ids, least, more, count):
    detection = RepetitionDetection(
        max_pattern_size=least + more, min_pattern_size=least, min_count=count
    )
    watch = RepetitionWatch(detection)
    for size in range(1, len(ids) + 1):
        assert watch.push(ids[size - 1]) == repeats(ids[:size], least, least + more, count)


def test_an_answer_that_repeats_itself_ends():
    detection = RepetitionDetection(max_pattern_size=3, min_count=3)
    ids = [7, *[5, 6] * 9]
    answer, _ = completion(ids, repetition_detection=detection)
    assert (answer.finish_reason, answer.stop_reason) == ("repetition", "repetition_detected")
    assert answer.tokens == ids[:7]
    answer, _ = completion(ids, repetition_detection=detection, min_tokens=10)
    assert answer.tokens == ids[:10]


def test_the_length_counts_before_repetition_and_a_stop_before_the_length():
    detection = RepetitionDetection(max_pattern_size=1, min_count=2)
    ids = [IDS[b"a"], IDS[b"a"]]
    assert completion(ids, repetition_detection=detection)[0].finish_reason == "length"
    answer, _ = completion(ids, repetition_detection=detection, stop=("aa",))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "aa")


def test_log_probabilities_are_written_as_openai_does():
    answer, _ = completion([IDS[b"a"], IDS[b"\xe6"], EOT], end_ids=(EOT,), logprobs=2)
    first, second, end = answer.record()["logprobs"]["content"]
    zero = {"token": "\0", "logprob": -9999.0, "bytes": [0]}
    one = {"token": "a", "logprob": 0.0, "bytes": [97]}
    assert first == {**one, "top_logprobs": [one, zero]}
    assert (second["token"], second["bytes"]) == ("bytes:\\xe6", [0xE6])
    assert (end["token"], end["logprob"]) == ("<|eot|>", -2.0)


def test_as_many_alternatives_are_written_as_were_asked_for():
    answer, _ = completion([IDS[b"a"]], logprobs=0)
    assert answer.record()["logprobs"]["content"][0]["top_logprobs"] == []
    answer, _ = completion([IDS[b"a"]])
    assert "logprobs" not in answer.record()
    answer, _ = completion([5], tokenizer=None, logprobs=1)
    assert answer.record()["logprobs"]["content"][0]["token"] == "token_id:5"


def test_an_engine_that_gives_no_log_probability_is_found_out():
    answer = Completion(Request("a", (1,), 2), Sampling(logprobs=1), ())
    with pytest.raises(ValueError, match="none was given"):
        answer.push(1)


def test_the_first_token_of_a_prompt_has_no_log_probability():
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer.encode("abc"))
    answer = Completion(Request("a", ids, 1), Sampling(prompt_logprobs=1), (), tokenizer)
    for token in ids[1:]:  # as the chunks of a prompt come
        answer.push_prompt([-0.5], [[(token, -0.5), (0, -1.0)]])
    answer.push(ids[0])
    none, *others = answer.record()["prompt_logprobs"]
    assert none is None and [one["token"] for one in others] == ["b", "c"]
    assert others[0]["top_logprobs"] == [{"token": "b", "logprob": -0.5, "bytes": [98]}]
