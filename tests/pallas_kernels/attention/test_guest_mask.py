"""A mask that the library does not have, here a sliding window, on every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import (
    Coords,
    Mask,
    decode_attention,
    flash_attention,
    flash_implementation,
)
from pallas_kernels.attention.flash_xla import FlashXlaConfig
from tests.pallas_kernels.attention.cases import SCALE, assert_close, itself, place
from tests.pallas_kernels.attention.ways import MOSAIC_GPU

LENGTH, WINDOW = 100, 21
ROWS = Coords(*map(jnp.asarray, place([(1, 100)], [(0, 7), (2, 43, 500), (3, 50)])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Mask):
    """A query sees itself and the positions before it, `span` in all."""

    @property
    def span(self):
        return WINDOW

    @property
    def block_diagonal(self):
        return False

    def first(self, position):
        return position - (WINDOW - 1)


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.array(rng.standard_normal((2, 2, LENGTH, 64)), "float32") for _ in range(3)]


def judged(q, k, v):
    """Dense attention in float64, by the definition of a window; zeros on padding."""
    position, segment = (np.asarray(x) for x in ROWS)
    distance = position[:, :, None] - position[:, None]
    seen = (distance >= 0) & (distance < WINDOW) & (segment[:, :, None] == segment[:, None])
    seen &= segment[:, None] != 0
    scores = np.where(seen[:, None], np.einsum("bhsd,bhtd->bhst", q, k, dtype=float) * SCALE, -1e30)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bhst,bhtd->bhsd", p / p.sum(-1, keepdims=True), v)
    return np.where(segment[:, None, :, None] == 0, 0, out)


@pytest.mark.parametrize("data_decides", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
def test_any_loop_of_xla(data_decides, in_order):
    """Catches bounds of blocks that leave out a key of the window, or a band that is too narrow."""
    q, k, v = arrays()
    run = jax.jit(
        lambda *qkv: flash_attention(
            *qkv, ROWS, ROWS, scale=SCALE, mask=Window(), in_order=in_order,
            config=FlashXlaConfig(8, 16, data_decides=data_decides),
        )
    )  # fmt: skip
    assert_close(run(q, k, v), judged(q, k, v), 1e-5)


@pytest.mark.hopper
def test_the_hopper_kernel():
    case = itself("", Coords(*map(np.asarray, ROWS)))
    q, k, v = (x.astype("bfloat16") for x in arrays())
    with MOSAIC_GPU.checked():
        out = flash_attention(
            q, k, v, ROWS, ROWS, scale=SCALE, mask=Window(), implementation="mosaic_gpu",
            config=MOSAIC_GPU.config(case), interpret=MOSAIC_GPU.interpret,
        )  # fmt: skip
        out = np.asarray(jax.block_until_ready(out)).astype(np.float32)
    assert_close(out, judged(*(x.astype(np.float32) for x in (q, k, v))), 2e-2)


def test_decode():
    q, k, v = arrays()
    newest = Coords(*(x[:, -1:] for x in ROWS))
    out = decode_attention(q[:, :, -1:], k, v, newest, ROWS, scale=SCALE, mask=Window())
    assert_close(out, judged(q, k, v)[:, :, -1:], 1e-5)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_libraries_that_know_no_windows_refuse(name):
    """Both are told which tokens are of one chunk, which would be wrong of a window."""
    x = jax.ShapeDtypeStruct((2, 2, LENGTH, 64), "bfloat16")
    options = {"scale": SCALE, "in_order": True, "interpret": True, "implementation": name}
    assert flash_implementation(x, x, x, ROWS, ROWS, **options, chunk=WINDOW) == name
    with pytest.raises(ValueError, match=r"chunk|windows"):
        flash_implementation(x, x, x, ROWS, ROWS, **options, mask=Window())


def test_a_mask_and_a_chunk_are_one_too_many():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="both given"):
        flash_attention(q, k, v, scale=SCALE, mask=Window(), chunk=8)
