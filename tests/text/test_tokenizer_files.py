"""Files of tokenizers are read as they are meant, or refused in one sentence."""

import json

import pytest
from tokenizers import decoders, normalizers, pre_tokenizers

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer
from tests.small_tokenizers import ranked_tokenizer
from tests.text.texts import NASTY


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
    backend = ranked_tokenizer().backend
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
