"""Files of requests: found by pattern, read a row at a time, here and on an object store."""

import datetime
import decimal
import gzip
import io
import json
import pathlib
import sys
import tracemalloc

import obstore
import pyarrow
import pyarrow.parquet
import pytest

from jaxmoe.batch import sources
from jaxmoe.batch.objects import open_store
from jaxmoe.batch.sources import find_sources
from jaxmoe.batch.storage import storage_of
from jaxmoe.errors import UserError
from jaxmoe.files import rows as files

ROWS = [{"id": i, "prompt": f"tö{i}\u2028\r"} for i in range(1, 6)]
LINES = "\n\n".join(
    json.dumps(row, ensure_ascii=False, separators=(",\r", ":")) for row in ROWS
).encode()


def parquet(rows, **settings) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **settings)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "a.jsonl": b"\xef\xbb\xbf" + LINES,
    "lines.json": LINES + b"\n",
    "array.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.parquet": parquet(ROWS, row_group_size=2),
}


@pytest.fixture(params=["path", "s3"])
def folder(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "path" else request.getfixturevalue("store")


def parsed(source, start=0):
    return [
        (row.number, json.loads(row.content.decode("utf-8-sig")))
        for row in sources.rows(source, start)
    ]


@pytest.mark.parametrize("name", CONTENTS)
def test_rows_of_each_kind_of_file(folder, name):
    storage_of(folder).put(name, CONTENTS[name])
    (source,) = find_sources([f"{folder}/{name}"])
    assert source.path == f"{folder}/{name}" and source.size == len(CONTENTS[name])
    numbers = [1, 2, 3, 4, 5] if name in ("array.json", "a.parquet") else [1, 3, 5, 7, 9]
    expected = list(zip(numbers, ROWS, strict=True))
    assert parsed(source) == expected
    for start in (1, 3, 4, 9):
        assert parsed(source, start) == [row for row in expected if row[0] > start]


def test_patterns_and_folders_name_files_once_and_sorted(folder):
    place = storage_of(folder)
    for name in ("b.jsonl", "a.jsonl.gz", "in/c.parquet", "in/deep/d.jsonl", "notes.txt"):
        place.put(name, b"")

    if "://" in folder:
        obstore.put(open_store(folder), ".hidden.jsonl", b"")
    else:
        (pathlib.Path(folder) / ".hidden.jsonl").touch()

    def found(*patterns):
        names = [source.path for source in find_sources([f"{folder}/{one}" for one in patterns])]
        assert all(name.startswith(f"{folder}/") for name in names)
        return [name.removeprefix(f"{folder}/") for name in names]

    assert found("") == ["a.jsonl.gz", "b.jsonl"]
    assert found("*.jsonl", "b.jsonl", "?.jsonl") == ["b.jsonl"]
    assert found("in/c.parquet", "[ab].*") == ["a.jsonl.gz", "b.jsonl", "in/c.parquet"]
    assert found("*/*.parquet") == ["in/c.parquet"]
    assert found("**/*.jsonl") == ["b.jsonl", "in/deep/d.jsonl"]
    assert found("in/**") == ["in/c.parquet", "in/deep/d.jsonl"]
    assert found("notes.txt") == ["notes.txt"]
    for absent in ("*.json", "absent.jsonl", "in/deep/*.parquet"):
        with pytest.raises(UserError, match=r"is no file with requests; correct its name\.$"):
            found("b.jsonl", absent)


def test_one_file_under_two_names_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[a].jsonl").write_bytes(b"{}")
    found = find_sources(["[a].jsonl", "./*.jsonl", str(tmp_path), f"file://{tmp_path}"])
    assert len(found) == 1


def test_a_file_that_changed_is_not_read(folder):
    place = storage_of(folder)
    place.put("a.jsonl", b'{"a": 1}')
    (source,) = find_sources([f"{folder}/a.jsonl"])
    place.put("a.jsonl", b'{"a": 2}')
    with pytest.raises(UserError, match=r"a\.jsonl has changed since it was found"):
        list(sources.rows(source))
    assert find_sources([f"{folder}/a.jsonl"])[0].stamp != source.stamp
    place.delete("a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl (has changed|cannot be read: No such file)"):
        list(sources.rows(source))


def test_an_object_that_changes_while_it_is_read_is_no_mixture(store, monkeypatch):
    monkeypatch.setattr(sources, "_AT_ONCE", 16)
    place = storage_of(store)
    place.put("a.jsonl", b'{"a": 1}\n' * 20)
    (source,) = find_sources([f"{store}/a.jsonl"])
    rows = sources.rows(source)
    next(rows)
    place.put("a.jsonl", b'{"a": 2}\n' * 20)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: "):
        list(rows)


def test_reading_survives_a_store_that_fails_for_a_while(store, proxy):
    storage_of(store).put("a.parquet", CONTENTS["a.parquet"])
    proxy.faults |= {"GET": ["busy", "lost", "slow"], "HEAD": ["lost", "busy"]}
    (source,) = find_sources([f"{store}/a.parquet"])
    assert [row for _, row in parsed(source)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "after line 7: Compressed file ended"),
        ("a.jsonl.gz", b"not gzip", ": Not a gzipped file"),
        ("a.jsonl.zst", CONTENTS["a.jsonl.zst"][:-9], ": "),
        ("a.jsonl.zst", b"no zstd at all", ": ZSTD"),
        ("a.parquet", CONTENTS["a.parquet"][:-9], ": Parquet magic bytes not found"),
        (
            "a.parquet",
            CONTENTS["a.parquet"].replace(b"2\xe2\x80", b"2\xff\xff"),
            ": 'utf-8' codec",
        ),
        ("a.parquet", b"", ": Parquet file size is 0"),
        ("array.json", b'[{"a": 1}, ', "is not JSON"),
        ("a.jsonl.xz", b"", "is compressed in a way that is not read"),
        ("b.parquet", parquet([{"prompt": "a", "took": datetime.timedelta(1)}]), ": .* timedelta"),
    ],
)
def test_damaged_files_are_named_and_where(folder, name, content, words):
    storage_of(folder).put(name, content)
    (source,) = find_sources([f"{folder}/{name}"])
    with pytest.raises(UserError, match=words) as caught:
        list(sources.rows(source))
    assert str(caught.value).startswith(source.path) and str(caught.value).endswith(".")


def test_a_line_that_is_too_long_is_cut_and_the_others_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    monkeypatch.setattr(files, "_PIECE", 64)
    longest, short = b'"' + b"a" * 98 + b'"', b'{"b": 1}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([longest, b"a" * 101, b"a" * 999, short]))
    (source,) = find_sources([str(tmp_path)])
    found = [(row.number, len(row.content)) for row in sources.rows(source)]
    assert found == [(1, 101), (2, 101), (3, 101), (4, 8)]
    assert next(sources.rows(source)).content == longest + b"\n"


def test_values_of_parquet_become_those_of_json(tmp_path):
    picture, other = b"\x89PNG\r\n\x1a\n...", b"\x00\x01"
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image", "image": {"bytes": picture}}]}],
        "other": other,
        "score": float("nan"),
        "price": decimal.Decimal("1.50"),
        "day": datetime.date(2026, 1, 2),
        "none": None,
    }
    (tmp_path / "a.parquet").write_bytes(parquet([row, row | {"score": 0.5}]))
    (source,) = find_sources([str(tmp_path)])
    (_, first), (_, second) = parsed(source)
    image = first["prompt"][0]["content"][0]["image"]["bytes"]
    assert image.startswith("data:image/png;base64,iVBORw0KGgo")
    rest = {key: first[key] for key in ("other", "price", "day", "none")}
    assert rest == {"other": "AAE=", "price": "1.50", "day": "2026-01-02", "none": None}
    assert first["score"] is None and second["score"] == 0.5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_a_file(tmp_path, name):
    rows = [{"prompt": "a" * 1000}] * 8000
    lines = "\n".join(map(json.dumps, rows)).encode()
    content = gzip.compress(lines, 1) if name.endswith("gz") else parquet(rows, row_group_size=100)
    (tmp_path / name).write_bytes(content)
    (source,) = find_sources([str(tmp_path)])
    del rows, lines, content
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    allocated = [pyarrow.total_allocated_bytes() for _ in sources.rows(source)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(allocated) == 8000 and most < 2**21 and max(allocated) - before < 2**21


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jsonl.zst").write_bytes(CONTENTS["a.jsonl.zst"])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst needs pyarrow"):
        list(sources.rows(*find_sources([str(tmp_path)])))
