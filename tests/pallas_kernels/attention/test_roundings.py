"""In bfloat16, a query's output does not depend on which of its keys share a block.

Only sums of float32 are in another order, which changes few of the outputs when they are rounded.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import flash_attention, merge
from pallas_kernels.attention.flash_mosaic import FlashMosaicConfig
from pallas_kernels.attention.flash_xla import FlashXlaConfig
from pallas_kernels.attention.masks import Coords
from pallas_kernels.attention.mosaic_backward import BackwardConfig
from pallas_kernels.attention.mosaic_forward import ForwardConfig
from tests.pallas_kernels.attention.cases import SCALE, draw
from tests.pallas_kernels.attention.test_decode import CASES as DECODE_CASES
from tests.pallas_kernels.attention.test_decode import MOSAIC_GPU as DECODE_MOSAIC
from tests.pallas_kernels.attention.test_decode import XLA_BFLOAT16 as DECODE_XLA
from tests.pallas_kernels.attention.test_decode import DecodeConfig, whole
from tests.pallas_kernels.attention.test_flash import ONE
from tests.pallas_kernels.attention.ways import MOSAIC_GPU, XLA, forward

FEW = 0.02  # of the outputs; without whole powers of two it is a quarter


def changed(x, y):
    """The fraction of bfloat16 values that differ."""
    x, y = (np.asarray(jnp.asarray(z, jnp.bfloat16).astype(jnp.float32)) for z in (x, y))
    return (x != y).mean()


@pytest.mark.parametrize(
    ("way", "configs"),
    [
        (XLA, [FlashXlaConfig(64, keys) for keys in (16, 96, 512)]),
        (
            MOSAIC_GPU,
            [
                FlashMosaicConfig(ForwardConfig(block_k=keys), BackwardConfig())
                for keys in (64, 128)
            ],
        ),
    ],
    ids=["xla", "mosaic_gpu"],
)
def test_blocks_of_any_size(way, configs):
    (case,) = ONE
    q, k, v, *_ = draw(case, "bfloat16")
    first, *others = (way.call(forward, case, 2 * q, k, v, config=config)[0] for config in configs)
    assert all(changed(first, other) < FEW for other in others)


@pytest.mark.parametrize(
    ("way", "configs"),
    [
        (DECODE_XLA, [FlashXlaConfig(block_k=keys) for keys in (64, 512)]),
        (DECODE_MOSAIC, [DecodeConfig(64, 2, 2, 1), DecodeConfig(64, 2, 1, 16)]),
    ],
    ids=["xla", "mosaic_gpu"],
)
def test_rows_in_any_number_of_tasks(way, configs):
    """On Hopper a row's keys are cut into tasks, whose size depends on the rows beside it."""
    (case,) = (case for case in DECODE_CASES if case.name == "one row")
    q, cache = draw(case, "bfloat16")[0], whole(case, "bfloat16")
    first, other = (way.call(case, 2 * q, cache, config=config)[0] for config in configs)
    assert changed(first, other) < FEW


def test_keys_in_any_number_of_parts():
    """Parts are rounded once, after they are joined."""
    (case,) = ONE
    q, k, v = map(jnp.asarray, draw(case, "bfloat16")[:3])

    def attend(keys):
        q_coords, all_keys = (Coords(*map(jnp.asarray, x)) for x in (case.q, case.k))
        coords = Coords(*(x[:, keys] for x in all_keys))
        return flash_attention(
            2 * q, k[:, :, keys], v[:, :, keys], q_coords, coords, scale=SCALE, chunk=case.chunk,
            return_lse=True, implementation="xla",
        )  # fmt: skip

    (at_once, _), *parts = (attend(slice(*ends)) for ends in [(None,), (100,), (100, None)])
    assert changed(at_once, merge(parts)) < FEW


def test_a_query_that_sees_one_key_gives_its_value():
    """Weights are divided by the sum of what they were rounded to."""
    q, k, v = (
        jnp.asarray(x, jnp.bfloat16)
        for x in np.random.default_rng(0).normal(size=(3, 64, 1, 1, 64))
    )
    coords = Coords(*(jnp.ones((64, 1), jnp.int32),) * 2)
    out = flash_attention(q, k, v, coords, coords, scale=SCALE, implementation="xla")
    np.testing.assert_array_equal(out.astype(jnp.float32), v.astype(jnp.float32))
