import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.train import data
from jaxmoe.train.data import (
    check_documents,
    check_tokens,
    held_out_batches,
    is_held_out,
    read_tokens,
    split,
    training_batch,
)

BEGIN = 7


def documents(*lengths):
    """Tokens 100, 101, ... in documents of the given lengths, each after BEGIN."""
    text = iter(range(100, 100 + sum(lengths)))
    return np.concatenate([[BEGIN, *(next(text) for _ in range(n - 1))] for n in lengths])


def batch(tokens, step, seed=0, rows=3, length=8):
    return training_batch(tokens, BEGIN, length=length, rows=rows, seed=seed, step=step)


def test_a_step_sees_the_same_rows_whatever_came_before():
    tokens = documents(*[13] * 20)
    first = [batch(tokens, step) for step in range(30)]
    for step in (29, 3, 17):
        for resumed, original in zip(batch(tokens, step), first[step], strict=True):
            np.testing.assert_array_equal(resumed, original)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_sees_every_row_once_in_another_order(epoch):
    tokens = np.arange(100, 100 + 8 * 13)  # 12 rows an epoch, at a shift of up to one row
    steps = range(4 * epoch, 4 * (epoch + 1))
    rows = np.concatenate([batch(tokens, step).tokens for step in steps])
    starts = rows[:, 0]
    assert len(set(starts)) == 12 and len(set(starts % 8)) == 1
    assert list(starts) != sorted(starts)
    np.testing.assert_array_equal(rows - starts[:, None], np.tile(np.arange(8), (12, 1)))


def test_epochs_and_seeds_differ():
    tokens = np.arange(100, 900)
    first, other_epoch, other_seed = batch(tokens, 0), batch(tokens, 33), batch(tokens, 0, seed=1)
    assert (first.tokens != other_epoch.tokens).any()
    assert (first.tokens != other_seed.tokens).any()


def test_segments_begin_where_documents_do():
    tokens = documents(*[5] * 40)
    rows, segment_ids, *_ = batch(tokens, 0)
    begins = rows == BEGIN
    changes = np.diff(segment_ids, axis=1) == 1
    np.testing.assert_array_equal(changes, begins[:, 1:])
    assert segment_ids.min() >= 1


def test_split_keeps_documents_whole():
    tokens = documents(4, 3, 5, 2, 6, 3, 4)
    training, held_out = split(tokens, BEGIN, every=3)
    np.testing.assert_array_equal(held_out, np.concatenate([tokens[7:12], tokens[20:23]]))
    assert len(training) + len(held_out) == len(tokens)
    assert [is_held_out(i, 3) for i in range(7)] == [False, False, True] * 2 + [False]
    assert split(tokens, BEGIN, every=0)[1].size == 0


def test_held_out_batches_cover_every_token_once():
    tokens = documents(21, 22)
    batches = list(held_out_batches(tokens, BEGIN, length=8, rows=2))
    assert [b.tokens.shape for b in batches] == [(2, 8)] * 3
    real = np.concatenate([b.tokens[b.segment_ids != 0] for b in batches])
    np.testing.assert_array_equal(real, tokens)


def test_a_first_document_may_lack_its_beginning():
    tokens = documents(4, 3, 5, 2)[1:]
    _, held_out = split(tokens, BEGIN, every=2)
    np.testing.assert_array_equal(held_out, np.concatenate([tokens[3:6], tokens[11:]]))


def test_too_few_documents_to_hold_one_out_are_refused():
    tokens = documents(4, 3, 5)
    check_documents(tokens, BEGIN, 3, "tokens.npy")
    with pytest.raises(UserError, match=r"every is 4, but tokens\.npy has 3 document.*id, 7; put"):
        check_documents(tokens, BEGIN, 4, "tokens.npy")
    with pytest.raises(UserError, match=r"has 1 document.*bos_token_id, 8"):
        check_documents(tokens, 8, 2, "tokens.npy")


@pytest.mark.parametrize("bad", [-100, -1, 300, 2**40])
def test_tokens_that_the_model_lacks_are_refused_with_their_place(bad, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 8)
    tokens = np.arange(300)
    check_tokens(tokens, 300, "tokens.npy")
    tokens[[17, 200]] = bad
    with pytest.raises(UserError, match=rf"tokens\.npy holds {bad} at index 17.*0 to 299"):
        check_tokens(tokens, 300, "tokens.npy")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_raw_tokens_are_read_by_their_dtype(tmp_path, dtype):
    path = tmp_path / "train.bin"
    np.arange(50).astype(dtype).tofile(path)
    np.testing.assert_array_equal(read_tokens(path, dtype), np.arange(50))
    with pytest.raises(UserError, match=r"train\.bin is no .npy file.*'dtype'.*uint16 for nanoGPT"):
        read_tokens(path)
    path.write_bytes(bytes(101))
    with pytest.raises(UserError, match=r"101 bytes, which are no tokens of"):
        read_tokens(path, dtype)


def test_an_npy_file_names_its_own_dtype(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(50))
    with pytest.raises(UserError, match="names its own dtype"):
        read_tokens(tmp_path / "tokens.npy", "uint16")


def damaged(header):
    """An .npy file of 50 tokens with another header."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(100)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(100), r"is an \.npz archive"),
        (b"", r"is no \.npy file"),
        (damaged("{'descr': '<u2', 'fortran_order': False, 'shape': (60,)}"), "damaged"),
        (damaged("{'descr': '<u2', 'fortran_order': False, 'shape': (40,)}"), "longer than"),
        (damaged("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}"), "damaged"),
        (damaged("{'descr': '<u2', 'fortran_order': False, 'shape': (1e9"), "damaged"),
        (damaged("{'descr': ((((((, 'fortran_order': False, 'shape': (50,)}"), "damaged"),
        (damaged("(" * 110), "damaged"),
        (damaged("{'descr': '|O', 'fortran_order': False, 'shape': (50,)}"), "damaged"),
        (damaged("{'descr': '<f2', 'fortran_order': False, 'shape': (50,)}"), "not integers"),
        (damaged("{'descr': '<u2', 'fortran_order': False, 'shape': (0,)}"), "tokens.npy"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "tokens.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_tokens(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="12 training tokens are too few for rows of 8 tokens"):
        batch(np.arange(12), 0)


@pytest.mark.parametrize("content", [np.zeros((2, 3), int), np.zeros(3), None])
def test_a_bad_token_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokens.npy"
    if content is None:
        path.write_bytes(b"\x93NUMPY")
    else:
        np.save(path, content)
    with pytest.raises(UserError, match=r"tokens\.npy"):
        read_tokens(path)
