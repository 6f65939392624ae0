"""Ranks to byte-pair encoding, special tokens, and Meta's own vocabulary, held against tiktoken."""

import random

import pytest
import tokenizers

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer
from jaxmoe.text.meta_vocabulary import special_names
from tests.small_tokenizers import ranked_tokenizer
from tests.text.texts import NASTY

RANDOM_PARTS = [
    *"aAb\u00e9 \u00df\t\n\r'sT19_.-/<|>",
    "  ",
    "\u0301",
    "\u65e5",
    "\u3000",
    "\U0001f600",
    "don't",
]


def ids_by_pieces(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [id_ for piece in pieces for id_ in tokenizer.encode(piece)]


# Ranks to byte-pair encoding


def test_lower_rank_merges_first():
    assert ranked_tokenizer(b"bc", b"ab").encode("abc") == [ord("a"), 256]
    assert ranked_tokenizer(b"ab", b"bc").encode("abc") == [256, ord("c")]


def test_whole_word_in_the_vocabulary_needs_no_merges():
    # Only ignore_merges finds it: no two tokens make "abcd", and "ab" would merge before it.
    assert ranked_tokenizer(b"ab", b"abcd").encode("abcd") == [257]


def test_long_runs_are_cut_as_in_metas_tokenizer():
    tokenizer, run = ranked_tokenizer(b"aa"), "a" * 24_999
    assert tokenizer.encode("ba" + run) == ids_by_pieces(tokenizer, "b" + run, "a")
    assert tokenizer.encode("b " + run + "a") == ids_by_pieces(tokenizer, "b", " " + run + "a")
    assert tokenizer.encode("ba" + run) != [ord("b"), *tokenizer.encode(run + "a")]


def test_huge_text_is_cut_as_in_metas_tokenizer():
    tokenizer, text = ranked_tokenizer(b"ab"), "ab " * 133_334  # character 400,000 is a "b"
    ids = tokenizer.encode(text)
    assert ids.count(256) == 133_333
    assert len(ids) == 2 * 133_334 + 1


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        (200_000, "begin_of_text"),
        (200_001, "end_of_text"),
        (200_004, "fim_suffix"),
        (200_005, "header_start"),
        (200_006, "header_end"),
        (200_007, "eom"),
        (200_008, "eot"),
        (200_009, "step"),
        (200_010, "text_post_train_reserved_special_token_0"),
        (200_015, "text_post_train_reserved_special_token_5"),
        (200_016, "python_start"),
        (200_017, "python_end"),
        (200_018, "finetune_right_pad"),
        (200_019, "text_post_train_reserved_special_token_8"),
        (200_079, "text_post_train_reserved_special_token_68"),
        (200_080, "image_start"),
        (200_081, "image_end"),
        (200_083, "vision_reserved_special_token_1"),
        (200_084, "tile_x_separator"),
        (200_085, "tile_y_separator"),
        (200_086, "vision_reserved_special_token_2"),
        (200_090, "image"),
        (200_091, "vision_reserved_special_token_6"),
        (200_092, "patch"),
        (200_093, "vision_reserved_special_token_7"),
        (201_133, "vision_reserved_special_token_1047"),
        (201_134, "reasoning_reserved_special_token_0"),
        (201_142, "reasoning_thinking_start"),
        (201_143, "reasoning_thinking_end"),
        (201_144, "reserved_special_token_0"),
        (202_047, "reserved_special_token_903"),
    ],
)
def test_special_token_ids(id_, name):
    assert special_names()[id_ - 200_000] == f"<|{name}|>"


def test_special_tokens_are_2048_different_ones():
    assert len(set(special_names())) == len(special_names()) == 2_048


# Meta's own vocabulary


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19873, 3817]),
        ("The capital of France is", [954, 7963, 323, 11698, 373]),
        ("\n\n", [368]),
        ("user", [1556]),
        ("system", [15651]),
        ("assistant", [140680]),
        ("ipython", [607, 6934]),
        ("1234567 don't   x\n\n  y", [7235, 19596, 35, 5863, 256, 831, 368, 220, 386]),
    ],
)
def test_meta_ids(meta, text, ids):
    assert meta.encode(text) == ids


def test_meta_sizes_and_stop_ids(meta):
    assert meta.vocab_size == 202_048
    assert meta.bos_id == 200_000
    assert meta.stop_ids == (200_001, 200_007, 200_008)
    assert meta.specials == {name: 200_000 + n for n, name in enumerate(special_names())}


@pytest.mark.parametrize("text", NASTY)
def test_meta_ids_are_tiktokens(meta, tiktoken_oracle, text):
    assert meta.encode(text) == tiktoken_oracle.encode_ordinary(text)
    assert meta.decode(meta.encode(text)) == text


def test_meta_ids_are_tiktokens_on_random_text(meta, tiktoken_oracle):
    draw = random.Random(0)
    for _ in range(3_000):
        text = "".join(draw.choices(RANDOM_PARTS, k=draw.randint(1, 40)))
        assert meta.encode(text) == tiktoken_oracle.encode_ordinary(text), repr(text)


def test_meta_vocabulary_saved_as_tokenizer_json(meta, tmp_path):
    file = meta.save(tmp_path)
    loaded = Tokenizer.load(file)
    assert loaded.specials == meta.specials
    for text in NASTY:
        assert loaded.encode(text) == meta.encode(text)
    # To other readers of the file it is the published one: it parses specials and begins with BOS.
    plain = tokenizers.Tokenizer.from_file(str(file))
    assert plain.encode("Hello world<|eot|>").ids == [200_000, 19873, 3817, 200_008]


def test_llama_3_vocabulary_is_refused(meta_folder):
    with pytest.raises(UserError, match=r"128,000 tokens .* another model"):
        Tokenizer.load(meta_folder / "llama3")
