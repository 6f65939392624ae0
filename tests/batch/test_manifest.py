"""How the rows of a job are cut into blocks."""

import json

import pytest

from jaxmoe.batch import manifest
from jaxmoe.batch.sources import find_sources


@pytest.mark.parametrize(
    ("rows", "nbytes", "expected"),
    [
        (40, 4000, 16),
        (6400, 6400, 100),
        (1_000_000, 10_000, 512),
        (64, 64 * 1000, 16),
        (64, 64 * 3000, 12),  # 13 rows would be 39 kB, of which blocks have a multiple of 4
        (3, 10**6, 1),
    ],
)
def test_a_block_is_a_share_of_the_job_and_not_too_large(monkeypatch, rows, nbytes, expected):
    """Catches blocks of pictures that no process can hold, or tell another of."""
    monkeypatch.setattr(manifest, "HEAVIEST", 40_000)
    assert manifest._block_rows(rows, nbytes) == expected


def test_the_bytes_of_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "HEAVIEST", 40_000)
    row = json.dumps({"tokens": [1], "text": "x" * 4900})
    (tmp_path / "in.jsonl").write_text(f"{row}\n" * 20)
    made = manifest.make_manifest("job", find_sources([str(tmp_path / "in.jsonl")]))
    assert (made.rows, made.block) == (20, 8)
