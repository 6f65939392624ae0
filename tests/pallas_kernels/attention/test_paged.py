"""Attention of several sequences' queries to a pool of pages, by every way, against float64."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import ChunkedMask, Coords, Mask, paged, paged_attention
from pallas_kernels.attention.tpu_tiles import PagedTpuConfig
from pallas_kernels.quantized import quantize
from tests.isolation import assert_isolated
from tests.pallas_kernels.attention.paged_cases import NEW, PAGE, SIZE, Problem
from tests.pallas_kernels.attention.test_roundings import FEW, changed
from tests.pallas_kernels.hopper import INTERPRET, no_races
from tests.pallas_kernels.tpu import INTERPRET as TPU_INTERPRET
from tests.pallas_kernels.tpu import no_races as no_tpu_races

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
MASKS = {"causal": Mask(), "chunks": ChunkedMask(chunk=48)}


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation, a type of queries and a format of the cache."""

    implementation: str
    dtype: str = "float32"
    format: str | None = None
    config: Any = None
    interpret: Any = None
    checked: Callable = contextlib.nullcontext

    def __str__(self):
        return "-".join(filter(None, (self.implementation, self.dtype, self.format)))

    def call(self, mask, *arguments):
        options = {
            "scale": SIZE**-0.5, "mask": mask, "implementation": self.implementation,
            "config": self.config, "interpret": self.interpret,
        }  # fmt: skip
        with self.checked():
            return jax.block_until_ready(attend(tuple(options.items()), *arguments))


@functools.partial(jax.jit, static_argnums=0)
def attend(options, *arguments):
    return paged_attention(*arguments, **dict(options))


XLA = Way("xla")
MOSAIC_GPU = Way("mosaic_gpu", "bfloat16", interpret=INTERPRET, checked=no_races)
MOSAIC_TPU = Way(
    "mosaic_tpu",
    "bfloat16",
    config=PagedTpuConfig(block_q=32, block_k=128, slots=2, cores=2),
    interpret=TPU_INTERPRET,
    checked=no_tpu_races,
)


def of_format(way, format):
    return dataclasses.replace(way, format=format)


WAYS = [XLA, *(of_format(XLA, x) for x in ("int8", "fp8", "int4")), MOSAIC_GPU]
TPU_WAYS = [MOSAIC_TPU, of_format(MOSAIC_TPU, "int8")]
MORE_TPU_WAYS = [
    dataclasses.replace(MOSAIC_TPU, dtype="float32"),
    of_format(MOSAIC_TPU, "fp8"),
    of_format(MOSAIC_TPU, "int4"),
]


@functools.cache
def results(way, mask):
    """The arrays of a problem, and what comes of them."""
    problem = Problem(0)
    arrays = problem.arrays(way.dtype, way.format)
    return problem, arrays, way.call(MASKS[mask], *arrays, *problem.where())


def check(found, expected, dtype):
    for ours, theirs, tolerance in zip(found, expected, (TOLERANCE[dtype], 1e-5), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance)


@pytest.mark.parametrize(
    ("way", "mask"),
    [(way, mask) for way in WAYS + TPU_WAYS for mask in MASKS]
    + [(way, "causal") for way in MORE_TPU_WAYS],
    ids=str,
)
def test_sequences_side_by_side(way, mask):
    """Whatever the types, the log-sum-exp is exact, and shows each key too many or too few."""
    problem, arrays, found = results(way, mask)
    check(found, problem.expected(*arrays, MASKS[mask]), way.dtype)


def test_roundings_do_not_depend_on_blocks():
    """Catches maxima that are no whole powers of two: those differ by blocks."""
    _, arrays, (out, _) = results(MOSAIC_TPU, "causal")
    way = dataclasses.replace(MOSAIC_TPU, config=PagedTpuConfig(block_q=64, block_k=256))
    other, _ = way.call(Mask(), *arrays, *Problem(0).where())
    assert changed(out, other) < FEW


@pytest.mark.parametrize("mask", MASKS)
def test_copied(mask, monkeypatch):
    """What kernels that take rows run on, in three parts."""
    monkeypatch.setattr(paged, "_in_place", _copied)
    problem, rule = Problem(0), MASKS[mask]
    arrays = problem.arrays("float32")
    found = paged_attention(*arrays, *problem.where(), scale=SIZE**-0.5, mask=rule)
    check(found, problem.expected(*arrays, rule), "float32")


def _copied(scale, mask, *arguments):
    options = {"scale": scale, "mask": mask, "implementation": "xla"}
    return paged._copied(options, 5, *arguments)


# All heads' queries of a row are one product; one core computes its last tile again.
IN_ROWS = PagedTpuConfig(block_q=256, block_k=128, slots=2, cores=3)


@pytest.mark.parametrize(
    "way", [XLA, *(dataclasses.replace(way, config=IN_ROWS) for way in TPU_WAYS)], ids=str
)
def test_rows(way, monkeypatch):
    """A sequence a row, and for "xla" two pages of each copied at a time."""
    monkeypatch.setattr(paged, "COPIED_ROWS", 2 * PAGE * len(NEW))
    problem, mask = Problem(0), Mask()
    q, k, v = problem.arrays(way.dtype, way.format)
    expected = problem.expected(q, k, v, mask)
    found = way.call(mask, problem.rows(q), k, v, *problem.where_in_rows())
    filled = np.arange(max(NEW)) < np.array(NEW)[:, None]
    for row, (of_row, new) in enumerate(zip(filled, NEW, strict=True)):
        out, lse = (np.asarray(x[row]) for x in found)
        assert not out[:, ~of_row].any() and (lse[:, ~of_row] == -np.inf).all()
        own = problem.of(row + 1)
        check((out[:, :new], lse[:, :new]), (x[0][:, own] for x in expected), way.dtype)


@pytest.mark.parametrize("way", [XLA, *TPU_WAYS], ids=str)
def test_nan_stays_in_its_sequence(way):
    """One key of NaN, one infinite value; of integers, in their scales."""
    problem, (q, *cache), clean = results(way, "causal")

    def spoil(x, number, value):
        page, at = problem.pages_of(number)[0], 3
        return jax.tree.map(
            lambda leaf: leaf if leaf.dtype == jnp.int8 else leaf.at[page, :, at].set(value), x
        )

    k, v = spoil(cache[0], 2, np.nan), spoil(cache[1], 5, np.inf)
    found = way.call(Mask(), q, k, v, *problem.where())
    hit = problem.of(2) | problem.of(5)
    for ours, theirs in zip(found, clean, strict=True):
        assert_isolated(*(np.moveaxis(np.asarray(x), 2, 0) for x in (ours, theirs)), hit)
    assert not np.isfinite(np.asarray(found[0])[:, :, hit]).any()


REFUSED = {
    "float16 queries": ({"dtype": "float16"}, "it takes bfloat16 or float32, not float16"),
    "another type of keys": ({"format": "float32"}, "and not a cache of float32"),
    "a large head": ({"size": 512}, "head sizes up to 256"),
    "heads that share keys": ({"heads": 128}, "128 query heads of 128 numbers for each key head"),
    "short pages": ({"page": 64}, "pages of 128 keys, .* not 64 in rows of 128"),
    "int4 not in pairs": ({"format": "int4"}, "pages of 128 keys, .* not 128 in rows of 64"),
    "no TPU": ({}, "it needs a TPU, and this is cpu"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_the_kernel_says_what_it_refuses(changes, reason):
    """As an error where it is named, and not where the fastest is wanted."""
    given = {"dtype": "bfloat16", "format": "bfloat16", "size": 128, "heads": 2, "page": 128}
    dtype, format, size, heads, page = (given | changes).values()
    keys = jax.ShapeDtypeStruct((3, 1, page, size), dtype if format == "int4" else format)
    if format == "int4":
        keys = jax.eval_shape(functools.partial(quantize, format=format), keys)
    q = jax.ShapeDtypeStruct((1, heads, 300, size), dtype)
    coords, pool, table = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 300), (3, page), (1, 2))
    )
    arguments = q, keys, keys, Coords(coords, coords), Coords(pool, pool), table

    def attend(name, *arguments):
        return paged_attention(*arguments, scale=1.0, implementation=name)

    with pytest.raises(ValueError, match=f"'mosaic_tpu' does not serve this call: .*{reason}"):
        jax.eval_shape(functools.partial(attend, "mosaic_tpu"), *arguments)
    out, _ = jax.eval_shape(functools.partial(attend, None), *arguments)
    assert (out.shape, out.dtype) == (q.shape, jnp.float32)
