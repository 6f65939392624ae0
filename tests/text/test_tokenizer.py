"""Text to tokens and back, whole and streamed."""

import random

import pytest
import tokenizers
from tokenizers import AddedToken, models

from jaxmoe.errors import UserError
from jaxmoe.text import StreamDecoder, Tokenizer
from tests.small_tokenizers import ranked_tokenizer
from tests.text.texts import NASTY


@pytest.mark.parametrize("text", NASTY)
def test_decode_undoes_encode(small, text):
    assert small.decode(small.encode(text)) == text


@pytest.mark.parametrize("name", ["<|eot|>", "<|begin_of_text|>", "<|header_start|>"])
def test_special_token_in_text_stays_text(small, name):
    ids = small.encode(f"x{name}y")
    assert not set(ids) & set(small.specials.values())
    assert small.decode(ids) == f"x{name}y"


def test_bos_comes_once_and_only_on_request(small):
    assert small.encode("the user", bos=True) == [small.bos_id, *small.encode("the user")]
    assert small.bos_id not in small.encode("the user")
    assert small.encode("", bos=True) == [small.bos_id]


def test_bos_ignores_the_files_own_post_processor():
    tokenizer = ranked_tokenizer()
    assert tokenizer.encode("a", bos=True) == [tokenizer.bos_id, ord("a")]


def test_half_a_surrogate_pair_is_a_user_error(small):
    with pytest.raises(UserError, match=r"'\\ud800'.*character 2"):
        small.encode("ab\ud800")


def test_special_token_is_parsed_on_request(small):
    eot = small.special("<|eot|>")
    assert small.encode("x<|eot|> <|eot", parse_special=True) == [
        *small.encode("x"),
        eot,
        *small.encode(" <|eot"),
    ]
    assert small.encode("<|eot|>", parse_special=True, bos=True) == [small.bos_id, eot]


def test_parsed_begin_of_text_is_not_doubled(small):
    text = "<|begin_of_text|>x"
    assert small.encode(text, bos=True, parse_special=True) == [small.bos_id, *small.encode("x")]
    assert small.encode(text, bos=True).count(small.bos_id) == 1


@pytest.mark.parametrize("text", [*NASTY, "<|eot|><|eot|> x <|begin_of_text|>\u00e9<|eot|>"])
def test_parsed_ids_are_the_librarys(small, text):
    """The ids are the same even if a special token absorbs the spaces around it."""
    small.backend.add_special_tokens([AddedToken("<\u00e9>", special=True, lstrip=True)])
    text += "  <\u00e9> y"
    plain = tokenizers.Tokenizer.from_str(small.backend.to_str())
    plain.encode_special_tokens = False
    expected = plain.encode(text, add_special_tokens=False).ids
    assert Tokenizer(small.backend).encode(text, parse_special=True) == expected


def test_decode_skips_or_shows_special_tokens(small):
    ids = [small.bos_id, *small.encode("user"), small.special("<|eot|>")]
    assert small.decode(ids) == "user"
    assert small.decode(ids, skip_special=False) == "<|begin_of_text|>user<|eot|>"


def test_ids_beyond_the_tokenizer_have_no_text(small):
    assert small.decode([small.vocab_size, *small.encode("a"), 10**6]) == "a"


def test_added_token_outside_ascii_decodes_to_itself(small):
    # Its characters are not stand-ins for bytes, as those of the vocabulary are.
    small.backend.add_tokens(["\u00e9"])
    assert small.decode(small.encode("caf\u00e9")) == "caf\u00e9"


def test_unknown_special_token_is_named(small):
    with pytest.raises(UserError, match=r"<\|patch\|>"):
        small.special("<|patch|>")


def test_stop_ids_are_those_the_tokenizer_has(small):
    assert small.stop_ids == (small.special("<|end_of_text|>"), small.special("<|eot|>"))


def test_vocab_size_counts_up_to_the_greatest_id():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    assert Tokenizer(backend).vocab_size == 8


# Streaming


@pytest.mark.parametrize("text", NASTY)
def test_streamed_pieces_are_the_decoded_text(small, text):
    stream = StreamDecoder(small)
    ids = [small.bos_id, *small.encode(text), small.special("<|eot|>")]
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_stream_holds_a_character_until_its_last_byte():
    stream = StreamDecoder(ranked_tokenizer())
    pieces = [stream.push(byte) for byte in "a\N{ROCKET}\u00e9".encode()]
    assert pieces == ["a", "", "", "", "\N{ROCKET}", "", "\u00e9"]
    assert stream.flush() == ""


def test_stream_never_waits_on_bytes_that_cannot_become_a_character():
    stream = StreamDecoder(ranked_tokenizer())
    assert [stream.push(byte) for byte in b"\xff\x80b"] == ["\ufffd", "\ufffd", "b"]


def test_flush_shows_a_character_that_was_cut_off():
    stream = StreamDecoder(ranked_tokenizer())
    assert [stream.push(byte) for byte in "\N{ROCKET}".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_stream_of_random_bytes_is_the_decoded_text():
    tokenizer, draw = ranked_tokenizer(), random.Random(0)
    for _ in range(300):
        ids = [draw.choice([0xE2, 0x82, 0xAC, 0xF0, 0x41, draw.randrange(258)]) for _ in range(9)]
        stream = StreamDecoder(tokenizer, skip_special=False)
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert streamed == tokenizer.decode(ids, skip_special=False)
        assert streamed == tokenizer.backend.decode(ids, skip_special_tokens=False)
