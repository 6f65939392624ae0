"""`decode_attention`: every implementation and every format of the cache against float64 NumPy."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.attention import decode_attention, flash_xla
from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.attention.tpu_plan import DecodeTpuConfig
from pallas_kernels.compile.absent import absent_h100s, lower_for
from tests.pallas_kernels.attention.cases import (
    SCALE,
    TOLERANCE,
    assert_close,
    assert_same_zeros,
    draw,
)
from tests.pallas_kernels.attention.decode_cases import (
    BLOCK,
    CASES,
    Cache,
    decoding,
    filled,
    head_size_128,
    in_pages,
    judged,
    newest,
    whole,
)
from tests.pallas_kernels.hopper import INTERPRET, no_races
from tests.pallas_kernels.tpu import INTERPRET as TPU_INTERPRET
from tests.pallas_kernels.tpu import no_races as no_tpu_races


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation and a type of queries, run without its hardware."""

    implementation: str
    dtype: str
    config: Any
    interpret: Any = None
    checked: Callable = contextlib.nullcontext
    kind: str = ""  # of those with one implementation

    def __str__(self):
        return f"{self.implementation}{self.kind}-{self.dtype}"

    def call(self, case, q, cache: Cache, **changes):
        options = {
            "scale": SCALE, "causal": case.causal, "chunk": case.chunk, "return_lse": True,
            "implementation": self.implementation, "config": self.config,
            "interpret": self.interpret, **changes,
        }  # fmt: skip
        k_coords = cache.coords or (None if case.plain else case.k)
        with self.checked():
            return jax.block_until_ready(
                decode(tuple(options.items()), q, *cache[:2], case.q, k_coords, cache.table)
            )


@functools.partial(jax.jit, static_argnums=0)
def decode(options, q, k, v, q_coords, k_coords, table):
    return decode_attention(q, k, v, q_coords, k_coords, table=table, **dict(options))


XLA = Way("xla", "float32", flash_xla.FlashXlaConfig(block_k=BLOCK))
XLA_BFLOAT16 = dataclasses.replace(XLA, dtype="bfloat16")
# As on GPUs, whose host does not wait for data.
XLA_OF_FIXED_LENGTH = dataclasses.replace(
    XLA, config=flash_xla.FlashXlaConfig(block_k=BLOCK, data_decides=False), kind="-fixed"
)
MOSAIC_GPU = Way(
    "mosaic_gpu",
    "bfloat16",
    DecodeConfig(block_k=BLOCK, slots=2, tasks_per_core=2, least_blocks=1),
    interpret=INTERPRET,
    checked=no_races,
)
MOSAIC_TPU = Way(
    "mosaic_tpu",
    "bfloat16",
    DecodeTpuConfig(block_k=2 * BLOCK, slots=2, cores=2),
    interpret=TPU_INTERPRET,
    checked=no_tpu_races,
)
MOSAIC_TPU_FLOAT32 = dataclasses.replace(MOSAIC_TPU, dtype="float32")
WAYS = XLA, XLA_BFLOAT16, XLA_OF_FIXED_LENGTH, MOSAIC_GPU, MOSAIC_TPU
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def named(*names):
    chosen = [case for case in CASES if case.name in names]
    assert len(chosen) == len(names)
    return chosen


def runs(way, formats, cases):
    return [
        pytest.param(way, format, case, id=f"{way}-{format}-{case.name}")
        for format in formats
        for case in cases
    ]


def each_in_turn(way, formats, cases):
    pairs = zip(formats, cases, strict=True)
    return [run for format, case in pairs for run in runs(way, [format], [case])]


FORMATS = "int8", "fp8", "int4"
FEW = head_size_128(named("four queries a row", "ring of a chunk", "keys that no block divides"))
LENGTHS = named("rows of any length")
(FOUR,) = named("four queries a row")


def check(way, case, cache, q=None, **changes):
    q = draw(case, way.dtype)[0] if q is None else q
    out, lse = way.call(case, q, cache, **changes)
    want = judged(case, q, cache)
    assert (out.dtype, lse.dtype) == ("float32", "float32")
    assert_close(out, want.out, TOLERANCE[way.dtype])
    assert_close(lse, want.lse, TOLERANCE["float32"])
    assert_same_zeros(out, want.out)


@pytest.mark.parametrize(
    ("way", "format", "case"),
    runs(XLA, ["float32"], CASES)
    + runs(XLA, ["bfloat16", *FORMATS], FEW + LENGTHS)
    + runs(XLA_BFLOAT16, ["bfloat16", *FORMATS], FEW)
    + runs(XLA_OF_FIXED_LENGTH, ["float32"], CASES)
    + runs(XLA_OF_FIXED_LENGTH, ["int8"], FEW)
    + runs(MOSAIC_GPU, ["bfloat16"], CASES)
    + each_in_turn(MOSAIC_GPU, FORMATS, FEW)
    + runs(MOSAIC_GPU, ["int8", "fp8"], LENGTHS)
    + runs(MOSAIC_TPU, ["bfloat16"], CASES)
    + each_in_turn(MOSAIC_TPU, FORMATS, FEW)
    + runs(MOSAIC_TPU, FORMATS, LENGTHS)
    + runs(MOSAIC_TPU_FLOAT32, ["int4"], FEW[:1]),
)
def test_output(way, format, case):
    """Whatever the types, the log-sum-exp is exact, and shows each key too many or too few."""
    check(way, case, whole(case, format))


PAGED = decoding("", newest(1, 1, 150, 64, 384), filled(384, 1, 150, 64, 384), head_dim=128)


@pytest.mark.parametrize(
    ("format", "page"), [("plain", 64), ("int8", 64), ("fp8", 128), ("int4", 128)]
)
@every_way
def test_pages(way, format, page):
    format = way.dtype if format == "plain" else format
    check(way, PAGED, in_pages(PAGED, format, page))


def with_nan(cache, index):
    return cache._replace(**{name: getattr(cache, name).at[index].set(np.nan) for name in "kv"})


@every_way
def test_blocks_that_no_row_sees_are_not_read(way):
    """NaN shows up as soon as it is multiplied with a probability, even 0."""
    case = decoding("", newest(1, 130, 192), filled(320, 130, 192), chunk=128)
    cache = whole(case, way.dtype)
    for unseen in (slice(None, 128), slice(192, None)):
        cache = with_nan(cache, (slice(None), slice(None), unseen))
    check(way, case, cache)


@pytest.mark.hopper
def test_a_row_reads_its_own_blocks_only():
    """Also in pages: page 0 is that past the end of every row."""
    (case,) = LENGTHS
    check(MOSAIC_GPU, case, with_nan(whole(case, "bfloat16"), (0, slice(None), slice(64, None))))
    check(MOSAIC_GPU, PAGED, with_nan(in_pages(PAGED, "bfloat16", 64), 0))


EACH_ONCE = pytest.mark.parametrize(
    ("way", "format"), [(XLA, "int8"), (MOSAIC_GPU, "int4")], ids=["xla-int8", "mosaic_gpu-int4"]
)


@EACH_ONCE
def test_own_config(way, format):
    """The sizes that a call without a config gets."""
    check(way, FOUR, whole(FOUR, format), config=None)


@EACH_ONCE
def test_large_scores_do_not_overflow(way, format):
    """Catches a softmax without its running maximum: exp(89) is no float32."""
    q = 8 * draw(FOUR, way.dtype)[0]
    cache = whole(FOUR, format)
    assert judged(FOUR, q, cache).lse.max() > 89
    check(way, FOUR, cache, q)


@EACH_ONCE
def test_output_alone(way, format):
    q, cache = draw(FOUR, way.dtype)[0], whole(FOUR, format)
    out = way.call(FOUR, q, cache, return_lse=False)
    assert out.dtype == way.dtype
    assert_close(out, judged(FOUR, q, cache).out, TOLERANCE[way.dtype])


@pytest.mark.absent_gpu
@pytest.mark.parametrize("format", ["bfloat16", *FORMATS])
@pytest.mark.parametrize(
    "name",
    ["fewer keys than a block", "keys that no block divides", "as many queries as there may be"],
)
def test_every_shape_lowers_for_hopper(name, format):
    """Catches shapes that the interpreter takes and the compiler does not."""
    (case,) = head_size_128(named(name))
    q, cache = draw(case, "bfloat16")[0], whole(case, format)
    attend = functools.partial(decode_attention, scale=SCALE, implementation="mosaic_gpu")
    lower_for(absent_h100s(1)[0], attend, q, *cache[:2], case.q)


@pytest.mark.absent_gpu
@pytest.mark.parametrize("format", ["bfloat16", *FORMATS])
def test_pages_lower_for_hopper(format):
    q, cache = draw(PAGED, "bfloat16")[0], in_pages(PAGED, format, 64)

    def attend(q, k, v, q_coords, coords, table):
        return decode_attention(
            q, k, v, q_coords, coords, table=table, scale=SCALE, implementation="mosaic_gpu"
        )

    lower_for(absent_h100s(1)[0], attend, q, *cache[:2], PAGED.q, cache.coords, cache.table)
