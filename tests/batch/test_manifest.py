"""How the rows of a job are cut into blocks."""

import json

import pytest

from jaxmoe.batch import manifest
from jaxmoe.batch.sources import find_sources


@pytest.mark.parametrize(
    ("rows", "length", "expected"),
    [
        (40, 0, 16),
        (6400, 0, 100),
        (100_000, 0, 512),
        (64, 1000, 16),
        (64, 3000, 12),  # 40 kB of rows
        (3, 200_000, 4),
    ],
)
def test_a_block_is_a_share_of_the_job_and_not_too_large(
    tmp_path, monkeypatch, rows, length, expected
):
    """Catches blocks of pictures that no process can hold, or tell another of."""
    monkeypatch.setattr(manifest, "HEAVIEST", 40_000)
    row = json.dumps({"tokens": [1], "text": "x" * length})
    (tmp_path / "in.jsonl").write_text(f"{row}\n" * rows)
    made = manifest.make_manifest("job", find_sources([str(tmp_path / "in.jsonl")]))
    assert (made.rows, made.block) == (rows, expected)
