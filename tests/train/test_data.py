import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.train.data import held_out_batches, is_held_out, read_tokens, split, training_batch

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
    rows, segment_ids = batch(tokens, 0)
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
