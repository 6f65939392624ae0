"""Whether NaN or inf in one place leaves all other results as they were, to the last bit."""

import numpy as np


def put(x, index, value):
    """A copy with `value` there."""
    x = np.array(x)
    x[index] = value
    return x


def marked(length, *indices):
    """A mask of so many, of which these are hit."""
    return put(np.zeros(length, bool), list(indices), True)


def is_spoiled(x):
    return not np.isfinite(np.asarray(x).astype(np.float32)).all()


def assert_isolated(got, want, hit=False):
    """`got` has the bits of `want`, no NaN, but for what is hit, a mask of its first axes."""
    got, want = (np.ascontiguousarray(np.asarray(x)[~np.asarray(hit)]) for x in (got, want))
    assert not np.isnan(want.astype(np.float32)).any()
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
