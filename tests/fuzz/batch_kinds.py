"""Files of batch jobs, in each form that is read, as kinds of input to damage."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from jaxmoe.batch.formats import encode_part, error_line, request_of
from jaxmoe.batch.sources import find_sources, rows
from tests.fuzz.runner import Kind

SAYS = [{"role": "user", "content": "in the plain?"}]
BODY = {"model": "m", "messages": SAYS, "max_tokens": 3, "stop": ["in"], "logit_bias": {"5": 1.5}}
LINES = [
    {"id": 1, "prompt": "the rain", "label": "a", "temperature": 0.5},
    {"prompt": SAYS, "score": 0.5},
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY},
    {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": [[1, 2], [3]], "n": 2}},
]
CONTENT = "".join(json.dumps(line) + "\n" for line in LINES).encode()


def _write_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(CONTENT)


def _write_gzip(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(CONTENT, mtime=0))


def _write_zstd(folder: Path) -> None:
    with pyarrow.output_stream(folder / "a.jsonl.zst", compression="zstd") as stream:
        stream.write(CONTENT)


def _write_parquet(folder: Path) -> None:
    picture = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}
    lines = [LINES[0] | {"images": [picture], "tags": ["a", "b"]}] * 5
    table = pyarrow.Table.from_pylist(lines)
    pyarrow.parquet.write_table(table, folder / "a.parquet", write_page_checksum=True)


def _read(folder: Path) -> list:
    asked = [request_of(row.content, "a", row.number) for row in rows(*find_sources([str(folder)]))]
    lines = [error_line(one.envelope, one.refusal or "It ended.") for one in asked]
    return [asked, encode_part(lines, "jsonl")]


def _same(a: list, b: list) -> bool:
    return a == b


def _kind(name: str, write: Callable[[Path], None]) -> Kind:
    return Kind(f"batch {name}", write, _read, _same, lambda folder: list(folder.iterdir()))


BATCH_KINDS = (
    _kind("lines", _write_lines),
    _kind("gzip", _write_gzip),
    _kind("zstd", _write_zstd),
    _kind("parquet", _write_parquet),
)
