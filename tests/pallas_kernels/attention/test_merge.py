"""`merge`: attention over parts of the keys joins to attention over all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Coords, flash_attention, merge
from tests.pallas_kernels.attention.cases import SCALE, assert_close, draw, each, judge, named

CUTS = (0, 13, 21, None)


@functools.partial(jax.jit, static_argnums=0)
def merged(chunk, q_coords, k_coords, q, k, v, d_out):
    """Attention merged from that over the keys between cuts; and its gradients."""

    def attend(part, q, k, v):
        coords = q_coords, Coords(*(c[:, part] for c in k_coords))
        keys = k[:, :, part], v[:, :, part]
        return flash_attention(q, *keys, *coords, scale=SCALE, chunk=chunk, return_lse=True)

    def run(q, k, v):
        return merge([attend(slice(*cut), q, k, v) for cut in itertools.pairwise(CUTS)])

    out, transpose = jax.vjp(run, q, k, v)
    return out, *transpose(d_out)


@each(named("three chunks and a bit", "packed", "rows that see nothing", "left padding"))
def test_merged_parts_are_the_whole(case):
    """Also where one part, or all, saw nothing; a NaN there would spread by the gradient."""
    *arrays, d_lse = draw(case)
    got = merged(case.chunk, case.q, case.k, *arrays)
    want = judge(case, *arrays, np.zeros(d_lse.shape))
    for x, y in zip(got, (want.out, want.dq, want.dk, want.dv), strict=True):
        assert_close(x, y, 1e-5)


def test_merge_sums_in_float32():
    """Catches bfloat16 sums: 64 equal parts of one value must give that value."""
    out = jnp.full((1, 1, 1, 1), 1.0078125, jnp.bfloat16)
    whole = merge([(out, jnp.zeros((1, 1, 1)))] * 64)
    assert whole.dtype == jnp.bfloat16
    assert whole == out
