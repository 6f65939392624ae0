"""Files of rows, and the forms of rows."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest

from jaxmoe.errors import UserError
from jaxmoe.train.conversations import Chat, Text, example_of, pair_of
from jaxmoe.train.sources import files_of, read_rows

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
TOOLS = [{"name": "f"}]


def share(speaker, value, **others):
    return {"from": speaker, "value": value} | others


FORMS = {
    "text": ({"text": "a", "meta": 3}, Text("a")),
    "completion": ({"prompt": "a", "completion": "b"}, Text("b", "a")),
    "messages": (
        {"messages": [USER, ASSISTANT], "tools": TOOLS, "text": "not this"},
        Chat([USER, ASSISTANT], TOOLS),
    ),
    "completion of messages": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        Chat([USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]),
    ),
    "ShareGPT": (
        {
            "system": "s",
            "tools": json.dumps(TOOLS),
            "conversations": [
                share("human", "hi"),
                share("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                share("observation", "2"),
                share("gpt", "hello", weight=0),
                USER,
            ],
        },
        Chat(
            [
                {"role": "system", "content": "s"},
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "2"},
                ASSISTANT | {"weight": 0},
                USER,
            ],
            TOOLS,
        ),
    ),
    "Alpaca": (
        {
            "instruction": "do",
            "input": "this",
            "output": "done",
            "system": "s",
            "history": [["hi", "hello"]],
            "text": "all of it again",
        },
        Chat(
            [
                {"role": "system", "content": "s"},
                USER,
                ASSISTANT,
                {"role": "user", "content": "do\nthis"},
                {"role": "assistant", "content": "done"},
            ]
        ),
    ),
    "Alpaca without input": (
        {"instruction": "hi", "input": "", "output": "hello", "history": None},
        Chat([USER, ASSISTANT]),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_a_row(name):
    row, expected = FORMS[name]
    assert example_of(row) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"txt": "a"}, "it has none of 'messages'"),
        ({"text": 3}, "under 'text' 3, not a text"),
        ({"messages": "hi"}, "under 'messages' 'hi', not a list"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "under 'completion' .*, not a text"),
        ({"conversations": [share("alien", "x")]}, r"in 'conversations\[0\]' no .*human, user"),
        ({"conversations": [share("function_call", "f()")]}, r"function_call of 'conv.* not JSON"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, r"in 'history\[0\]' no pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' and 'rejected', which only"),
        ({"messages": [USER], "tools": "{"}, "'tools' is not JSON"),
    ],
)
def test_a_row_of_no_form_names_the_key(row, words):
    with pytest.raises(UserError, match=words):
        example_of(row)


def test_a_pair_has_one_prompt():
    assert pair_of({"prompt": "a", "chosen": "b", "rejected": "c"}) == (
        Text("b", "a"),
        Text("c", "a"),
    )
    other = {"role": "assistant", "content": "no"}
    talks = {
        "chosen": [USER, ASSISTANT, USER, ASSISTANT],
        "rejected": [USER, ASSISTANT, USER, other],
    }
    given = [USER, ASSISTANT | {"weight": 0}, USER]
    assert pair_of(talks) == (Chat([*given, ASSISTANT]), Chat([*given, other]))
    with pytest.raises(UserError, match="has no 'prompt'"):
        pair_of({"chosen": "b", "rejected": "c"})


ROWS = [{"text": "one"}, {"text": "tw\u00f6"}, {"text": "three"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "lines.json", "array.json"])
def test_rows_come_with_their_places(tmp_path, name):
    path = tmp_path / name
    content = json.dumps(ROWS).encode() if name == "array.json" else b"\xef\xbb\xbf" + LINES
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = list(read_rows(path))
    assert [row.parse() for row in rows] == ROWS
    word, numbers = ("row", [1, 2, 3]) if ".json" == path.suffix else ("line", [1, 3, 5])
    numbers = [1, 3, 5] if name == "lines.json" else numbers
    assert [row.where for row in rows] == [f"{path} {word} {i}" for i in numbers]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow.*pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


def test_parquet_rows(tmp_path):
    table = pyarrow.Table.from_pylist([{"messages": [USER, ASSISTANT]}, {"messages": [USER]}])
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert rows[1].where.endswith("a.parquet row 2")
    assert example_of(rows[0].parse()) == Chat([USER, ASSISTANT])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read: Parquet"):
        list(read_rows(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[3]', r"a\.jsonl line 2 is no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl line 1 is no UTF-8 at byte 10"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.xz", b"", r"a\.jsonl\.xz is compressed in a way"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        [row.parse() for row in read_rows(tmp_path / name)]


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()
    found = files_of(str(tmp_path / "*.jsonl"))
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl"]
    for absent in ("*.parquet", "absent.jsonl"):
        with pytest.raises(UserError, match="is no file; correct its name"):
            files_of(str(tmp_path / absent))
