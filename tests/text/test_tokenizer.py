import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from jaxmoe.errors import UserError
from jaxmoe.text import StreamDecoder, Tokenizer
from jaxmoe.text.meta_vocabulary import byte_pair_encoder, special_names

ASTRONAUT = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}"
NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "spaces     in  the   middle",
    "tab\tand\t\ttabs \t mixed",
    "\r\n\r\n windows \r old mac \n unix\n\n\n",
    "x\n  \n\ty",
    "no\u00a0break\u2003em\u3000ideographic\u200bzero\u2028line\x85next\x1cunit\x0bvertical",
    "1 12 123 1234 12345678901234567890 3.14 1e-9 1,000,000",
    "\u0661\u0662\u0663\u0664 \u00bd \u2167 \u00b2 \u0967\u0968\u0969\u096a",
    "don't can't I'm you're they've he'll she'd it's",
    "DON'T CAN'T I'M YOU'RE THEY'VE HE'LL SHE'D IT'S 'sit 'tis rock'n'roll '\u017f",
    "camelCase PascalCase SCREAMING_SNAKE snake_case HTTPServer iPhone",
    "\u01c5 \u02b0 titlecase and modifier \u01c5\u02b0a",
    "!!! ??? ... --- === /// // /* */ #!/bin/sh\n!!\n/\n",
    "\N{GRINNING FACE} \N{THUMBS UP SIGN}\U0001f3fd \U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea",
    f"{ASTRONAUT}{ASTRONAUT} \u2764\ufe0f",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\u30ab\u30bf\u30ab\u30ca\u3002",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u5168\u89d2\uff01\uff11\uff12 \ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0baa\u0bbe\u0bb7\u0bc8",
    "e\u0301 cafe\u0301 caf\u00e9 Z\u0351\u036b\u0343a\u0321l\u0334g\u0300o",
    "\u0301starts with a mark",
    "\x00\x01\x7f\ufffd\ufeff\U0010ffff",
    "<|begin_of_text|>user text<|eot|><|header_start|>system<|header_end|>",
    "<|image|><|patch|> <|finetune_right_pad|><|reserved_special_token_0|>",
    "a" * 300 + "=" * 300 + " " * 300 + "\n" * 30,
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n",
    "https://example.org/path?q=1&r=%20#frag user@example.org",
]
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


def tiny(*merged: bytes) -> Tokenizer:
    """A tokenizer of all single bytes, and `merged` in the order of their ranks."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + rank for rank, token in enumerate(merged)}
    return Tokenizer(byte_pair_encoder(ranks, ["<|begin_of_text|>", "<|eot|>"]))


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
    tokenizer = tiny()
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
    stream = StreamDecoder(tiny())
    pieces = [stream.push(byte) for byte in "a\N{ROCKET}\u00e9".encode()]
    assert pieces == ["a", "", "", "", "\N{ROCKET}", "", "\u00e9"]
    assert stream.flush() == ""


def test_stream_never_waits_on_bytes_that_cannot_become_a_character():
    stream = StreamDecoder(tiny())
    assert [stream.push(byte) for byte in b"\xff\x80b"] == ["\ufffd", "\ufffd", "b"]


def test_flush_shows_a_character_that_was_cut_off():
    stream = StreamDecoder(tiny())
    assert [stream.push(byte) for byte in "\N{ROCKET}".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_stream_of_random_bytes_is_the_decoded_text():
    tokenizer, draw = tiny(), random.Random(0)
    for _ in range(300):
        ids = [draw.choice([0xE2, 0x82, 0xAC, 0xF0, 0x41, draw.randrange(258)]) for _ in range(9)]
        stream = StreamDecoder(tokenizer, skip_special=False)
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert streamed == tokenizer.decode(ids, skip_special=False)
        assert streamed == tokenizer.backend.decode(ids, skip_special_tokens=False)


# Files


def test_save_then_load_gives_the_same_tokenizer(small, tmp_path):
    assert small.save(tmp_path) == tmp_path / "tokenizer.json"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.specials == small.specials
        for text in NASTY:
            assert loaded.encode(text) == small.encode(text)


def test_folder_prefers_tokenizer_json(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not read")
    assert Tokenizer.load(tmp_path).vocab_size == small.vocab_size


def test_truncation_and_padding_saved_in_the_file_are_off(small, tmp_path):
    short, long = small.encode("user"), small.encode("the user asks the assistant")
    small.backend.enable_truncation(len(short) + 1)
    small.backend.enable_padding(length=len(short) + 1)
    small.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("user") == short
    assert loaded.encode("the user asks the assistant") == long


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has neither tokenizer.json nor"):
        Tokenizer.load(tmp_path)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "version https://git-lfs"])
def test_broken_tokenizer_json_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.load(tmp_path)


@pytest.fixture
def broken(small, tmp_path):
    """Saves the small tokenizer with changed JSON; returns the error of loading it."""

    def write(change) -> str:
        content = json.loads(small.backend.to_str())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"^{tmp_path}.tokenizer\.json ") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return write


@pytest.mark.parametrize("entry", ["\u65e5", "a ", "\x8e"])
def test_entry_that_stands_for_no_bytes_is_named(broken, entry):
    message = broken(lambda content: content["model"]["vocab"].update({entry: 999}))
    assert f"{entry!r} (id 999)" in message and "stands for no bytes" in message


def test_two_entries_of_one_id_are_named(broken):
    message = broken(lambda content: content["model"]["vocab"].update({"zzz": 300}))
    assert "'zzz'" in message and "one id, 300" in message


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"continuing_subword_prefix": "##"}),  # panics while it is read
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # likewise
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),  # panics when it encodes
        ("model", {"unk_token": "absent"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
    ],
)
def test_panics_and_errors_of_the_library_are_one_sentence(broken, capfd, part, value):
    def change(content):
        del content["model"]["vocab"]["!"]  # for unk_token: a byte that has no entry
        content["model"]["merges"] = [m for m in content["model"]["merges"] if "!" not in m]
        content[part] = content["model"] | value if part == "model" else value

    broken(change)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"]["vocab"].pop("!"),
        lambda content: content["model"]["vocab"].pop("\u0126"),  # byte 0x84
        lambda content: content.update(pre_tokenizer=None),
    ],
)
def test_tokenizer_that_loses_text_is_refused(broken, change):
    assert "loses text" in broken(change)


def test_prefix_space_and_normalizer_lose_nothing(train_small, tmp_path):
    backend = train_small([])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The")) == " the"


def test_special_token_that_is_a_byte_is_refused(broken):
    message = broken(lambda content: content["added_tokens"][-1].update(content="|"))
    assert "special token '|' out of plain text" in message


def test_special_token_that_is_a_whole_word_is_refused(broken):
    def change(content):
        content["model"]["ignore_merges"] = True
        content["pre_tokenizer"]["use_regex"] = False

    assert "special token '<|begin_of_text|>' out of plain text" in broken(change)


def test_bytes_may_be_the_normalizers_work(train_small, tmp_path):
    backend = train_small([])
    backend.normalizer = normalizers.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("na\u00efve caf\u00e9")) == "na\u00efve caf\u00e9"


def test_bytes_of_bytes_lose_text(broken):
    assert "loses text" in broken(lambda content: content.update(normalizer={"type": "ByteLevel"}))


def test_a_panic_while_encoding_is_a_user_error():
    backend = tiny().backend
    backend.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    with pytest.raises(UserError, match=r"cannot encode this text .*non-zero"):
        Tokenizer(backend).encode("a")


def test_merges_are_not_dropped_at_random(small):
    ids = small.encode("the user asks")
    small.backend.model.dropout = 0.9
    tokenizer = Tokenizer(small.backend)
    assert all(tokenizer.encode("the user asks") == ids for _ in range(9))


def test_tokenizer_that_is_not_byte_level_is_refused(train_small, tmp_path):
    backend = train_small([])
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json is not byte-level"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"IQ== 0\nnonsense\n", "line 2 is not"),
        (b"IQ== 0\n!!!! 1\n", "line 2 is not"),
        (b"IQ== zero\n", "line 1 is not"),
        (b"\x0a\x0e\x0a\x05<unk>\x15\xff\n", "line 1 is not"),  # a SentencePiece model
        (b"IQ== 0\nIg== 1\n", "holds 2 tokens"),
        (b"", "holds 0 tokens"),
    ],
)
def test_broken_tokenizer_model_is_named(tmp_path, content, complaint):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.model.* {complaint}"):
        Tokenizer.load(tmp_path)


# Ranks to byte-pair encoding


def test_lower_rank_merges_first():
    assert tiny(b"bc", b"ab").encode("abc") == [ord("a"), 256]
    assert tiny(b"ab", b"bc").encode("abc") == [256, ord("c")]


def test_whole_word_in_the_vocabulary_needs_no_merges():
    # Only ignore_merges finds it: no two tokens make "abcd", and "ab" would merge before it.
    assert tiny(b"ab", b"abcd").encode("abcd") == [257]


def test_long_runs_are_cut_as_in_metas_tokenizer():
    tokenizer, run = tiny(b"aa"), "a" * 24_999
    assert tokenizer.encode("ba" + run) == ids_by_pieces(tokenizer, "b" + run, "a")
    assert tokenizer.encode("b " + run + "a") == ids_by_pieces(tokenizer, "b", " " + run + "a")
    assert tokenizer.encode("ba" + run) != [ord("b"), *tokenizer.encode(run + "a")]


def test_huge_text_is_cut_as_in_metas_tokenizer():
    tokenizer, text = tiny(b"ab"), "ab " * 133_334  # character 400,000 is a "b"
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
