import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.cli import make_tokens as script
from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer
from jaxmoe.train import make_tokens
from jaxmoe.train.data import check_documents, read_tokens
from jaxmoe.train.make_tokens import documents, tokens_of

MODEL = Path(__file__).parents[2] / "demo" / "model"
TEXTS = ["In the beginning", "<|eot|> is text\n", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(MODEL)


def test_documents_lie_between_begin_and_end(tokenizer):
    tokens = tokens_of(TEXTS, tokenizer)
    assert tokens.dtype == np.uint16
    begins = np.flatnonzero(tokens == tokenizer.bos_id)
    assert len(begins) == 3 and begins[0] == 0
    parts = [tokenizer.decode(part.tolist()) for part in np.split(tokens, begins[1:])]
    assert parts == TEXTS
    ends = np.append(begins[1:], len(tokens)) - 1
    assert (tokens[ends] == tokenizer.special("<|end_of_text|>")).all()


def test_the_script_writes_what_training_reads(tmp_path, tokenizer, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    lines = '\ufeff{"text": "In"}\n\n{"text": "the", "meta": {"n": 1}}'
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    output = tmp_path / "tokens.npy"
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", str(MODEL), *files, "--output", str(output)])
    script.main()
    tokens = read_tokens(output)
    np.testing.assert_array_equal(tokens, tokens_of([TEXTS[0], "In", "the"], tokenizer))
    check_documents(tokens, tokenizer.bos_id, 3, output)
    assert "of 3 document(s)" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists and is not empty"):
        script.main()


@pytest.mark.parametrize(
    "line", [b"x", b"3", b"{}", b'{"text": 3}', b'{"text": "a", "text": "b"}', b"\xff", b"[" * 9999]
)
def test_a_line_without_text_is_named(tmp_path, line):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=r"in\.jsonl line 2"):
        list(documents(path))


def test_standard_output(tokenizer, capfdbinary, monkeypatch, tmp_path):
    """Catches a file that is called `-`, and words between the numbers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXTS[0])
    monkeypatch.setattr(sys, "argv", ["", str(MODEL), "a.txt", "--output", "-"])
    script.main()
    written = np.load(io.BytesIO(capfdbinary.readouterr().out))
    np.testing.assert_array_equal(written, tokens_of(TEXTS[:1], tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    reader, writer = os.pipe()  # which has no position
    make_tokens.save_tokens(f"/dev/fd/{writer}", written)
    assert np.load(io.BytesIO(os.read(reader, 2**16))).tolist() == written.tolist()


def test_other_mistakes(tmp_path, tokenizer, monkeypatch):
    for name in ("absent.jsonl", "absent.txt"):
        with pytest.raises(UserError, match=rf"{name}.* cannot be read: No such file"):
            list(documents(tmp_path / name))
    with pytest.raises(UserError, match="no documents"):
        tokens_of([], tokenizer)
    monkeypatch.setattr(make_tokens.np.lib.format, "write_array_header_1_0", full_disk)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        make_tokens.save_tokens(tmp_path / "tokens.npy", np.arange(3))
    assert list(tmp_path.iterdir()) == []


def full_disk(*_):
    raise OSError(28, "No space left on device")
