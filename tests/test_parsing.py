"""JSON and YAML of any content is read, or refused in one sentence."""

import pytest

from jaxmoe import parsing
from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json, read_json, read_yaml

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP, "f is nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "f is nested more than 64 deep"),
        ('{"a": 1, "a": 2}', "f cannot be used: it names 'a' twice"),
        ("1" * 5000, "it has a number of 5000 digits"),
        ("[NaN]", "NaN is no number in JSON"),
        ("[1e999]", "1e999, which is too large"),
        ("[1,\n2", r"f is not JSON: .* at line 2 column 2"),
        ("", "f is not JSON"),
    ],
)
def test_bad_json_is_one_sentence(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_json(text, "f")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP, "is nested more than 64 deep"),
        ("a: &a [*a]", "is nested more than 64 deep"),
        ("a: 1\na: 2", "it names 'a' twice"),
        ("a: " + "1" * 5000, "it has a number of 5000 digits"),
        ("a: 2026-99-99", "is no YAML that can be used"),
        ("a: [1", "is no YAML that can be used"),
        ("? [a]\n: 1", "is no YAML that can be used"),
        ("a: !!python/object:os.system {}", "is no YAML that can be used"),
        ("a: *b", "is no YAML that can be used"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_aliases_that_grow_are_refused(tmp_path):
    """Catches a file of 600 bytes that expands to 10^10 values."""
    file = tmp_path / "f.yaml"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(file)


def test_merges_that_grow_are_refused(tmp_path):
    """Catches mappings that are merged into each other and grow while YAML is parsed."""
    file = tmp_path / "f.yaml"
    lines = ["a0: &a0 {k: 1}"]
    merged = ("[" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 7))
    lines += [f"a{i}: &a{i} {{<<: {each}}}" for i, each in enumerate(merged, 1)]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="it merges more than 100000 values"):
        read_yaml(file)
    file.write_text("a: &a {<<: *a}")
    with pytest.raises(UserError, match="is nested more than 64 deep"):
        read_yaml(file)


def test_many_keys_take_time_in_proportion(tmp_path, monkeypatch):
    """Catches a quadratic search for keys named twice, which takes minutes for 1 MiB."""

    class Key(str):
        compared = 0

        def __eq__(self, other):
            Key.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    count = 300
    construct = parsing._Loader.construct_mapping

    def counted(self, node, deep=False):
        for key, _ in node.value:
            key.value = Key(key.value)
        return construct(self, node, deep)

    monkeypatch.setattr(parsing._Loader, "construct_mapping", counted)
    file = tmp_path / "f.yaml"
    file.write_text("".join(f"k{i}: {i}\n" for i in range(count)))
    assert len(read_yaml(file)) == count
    assert Key.compared < 10 * count


def test_yaml_numbers_and_merges(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("x: &x {lr: 3e-4, eps: 1e-05, n: 3}\ny: {<<: *x, n: 4}\nz: .5E+1\nw: 1e\n")
    x = {"lr": 3e-4, "eps": 1e-5, "n": 3}
    assert read_yaml(file) == {"x": x, "y": x | {"n": 4}, "z": 5.0, "w": "1e"}


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "f.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}


@pytest.mark.parametrize("name", ["missing", "a\0b", "\ud800", "n" * 300, "."])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(f"{tmp_path}/{name}")


def test_other_bytes_and_too_many(tmp_path):
    file = tmp_path / "f.json"
    file.write_bytes(b'"\xff"')
    with pytest.raises(UserError, match="is no UTF-8 at byte 1"):
        read_json(file)
    with pytest.raises(UserError, match="has more than 2 bytes"):
        read_json(file, max_bytes=2)


def test_a_large_limit_takes_no_memory(tmp_path):
    """Catches a buffer as large as the limit, for which a small machine has no memory."""
    file = tmp_path / "f.json"
    file.write_bytes(b"[1]")
    assert read_json(file, max_bytes=2**60) == [1]


def test_a_string_of_half_a_surrogate_pair_can_be_printed():
    with pytest.raises(UserError) as error:
        parse_json('{"\\ud800": 1, "\\ud800": 2}', "f")
    str(error.value).encode()
    assert parsing.parse_json('"\\ud83d\\ude00"', "f") == "😀"
