"""Cases of decoding: a few queries a row against a cache, plain or quantized, whole or in pages."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Coords
from pallas_kernels.quantized import Quantized, dequantize, in_pairs, quantize
from tests.pallas_kernels.attention.cases import FAR, Case, Results, draw, judge, place, rule

BLOCK = 64  # keys a step, of every implementation here
GARBAGE = 5e37  # times the values of keys that nobody sees: a sum of leaks overflows


def newest(count, *lengths):
    """Queries: the last tokens of sequences of these lengths, after padding if they are shorter."""
    real = [(min(count, length), length) for length in lengths]
    return place(*([(0, count - n), (1, n, length - n)] for n, length in real))


def filled(keys, *lengths):
    """Keys: sequences of these lengths from the first slot on."""
    return place(*([(1, length), (0, keys - length)] for length in lengths))


def ring(keys, *lengths):
    """Keys: slot s holds the newest position that is s modulo the slots, if there is one."""
    newest = np.array(lengths, np.int32)[:, None] - 1
    position = newest - (newest - np.arange(keys, dtype=np.int32)) % keys
    return Coords(position, (position >= 0).astype(np.int32))


def shuffled(coords):
    slots = np.random.default_rng(0).permutation(coords.position.shape[1])
    return Coords(*(c[:, slots] for c in coords))


def decoding(name, q, k, **options):
    return Case(name, q, k, **{"heads": (5, 1), "chunk": None, **options})


LENGTHS = 1, 150, 64, 320
STEPS = range(1, 131, 12)
EDGES = 320, 321, 322, 1000  # the newest token is a chunk's last, first, second, and in the middle
PACKED = place(
    [(1, 100), (2, 150), (3, 70)],
    [(1, 320)],
    [(3, 10), (0, 300), (3, 10, 10)],
    [(1, 64), (2, 256)],
)
REUSED = place(*([(2, n), (1, 320 - n, n // 3)] for n in (1, 60, 200, 319)))
DISTANT = place([(1, 320, FAR)], [(1, 99, FAR), (0, 221)], [(1, 320, FAR - 320)], [(1, 320)])
WIDE = {"heads": (10, 2), "head_dim": 128}

CASES = [
    decoding("rows of any length", newest(1, *LENGTHS), filled(320, *LENGTHS)),
    decoding("no coordinates of keys", newest(1, *LENGTHS), filled(320, *[320] * 4), plain=True),
    decoding(
        "some rows see nothing",
        place([(0, 1)], [(1, 1, 319)], [(1, 1, 319)], [(1, 1, 99)]),
        place([(1, 320)], [(0, 320)], [(2, 320)], [(1, 100), (0, 220)]),
    ),
    decoding("all rows see nothing", newest(1, *[99] * 4), place(*[[(2, 320)]] * 4)),
    decoding("keys in any order", newest(1, *LENGTHS), shuffled(filled(320, *LENGTHS))),
    decoding("packed", place([(2, 1, 149)], [(1, 1, 310)], [(3, 1, 19)], [(2, 1, 255)]), PACKED),
    decoding("both directions", newest(1, 1, 150, 99, 320), filled(320, *[320] * 4), causal=False),
    decoding(
        "both directions in a chunk",
        newest(1, 1, 150, 99, 320), filled(320, *[320] * 4), causal=False, chunk=100,
    ),
    decoding("far positions", place([(1, 1, FAR + 319)], *[[(1, 1, FAR + 98)]] * 3), DISTANT),
    decoding("far chunk", place([(1, 1, FAR + 319)], *[[(1, 1, FAR + 98)]] * 3), DISTANT, chunk=64),
    decoding("edges of a chunk", newest(1, 100, 101, 102, 300), filled(320, *[320] * 4), chunk=100),
    decoding("ring of a chunk", newest(1, *EDGES), ring(320, *EDGES), chunk=320),
    decoding(
        "ring with an older sequence",
        place(*([(2, 1, n - 1)] for n in (1, 60, 200, 319))), REUSED, chunk=320,
    ),
    decoding("two queries a row", newest(2, 1, 2, 150, 320), filled(320, 1, 2, 150, 320)),
    decoding("four queries a row", newest(4, 3, 320), filled(320, 3, 320), **WIDE),
    decoding(
        "queries over a chunk's edge",
        newest(4, 102, 301), filled(320, 102, 301), chunk=100, **WIDE,
    ),
    decoding(
        "queries of several segments",
        place([(1, 2, 98), (2, 2, 148)], [(0, 2), (3, 1, 5), (1, 1, 99)]),
        place([(1, 100), (2, 150), (0, 70)], [(1, 310), (3, 10)]), **WIDE,
    ),
    decoding("as many queries as there may be", newest(4, 128), filled(128, 128), heads=(6, 1)),
    decoding("one row", newest(1, 640), filled(640, 640)),
    decoding("many rows", newest(1, *STEPS), filled(130, *STEPS), heads=(2, 2)),
    decoding("keys that no block divides", newest(1, 201, 77), filled(201, 201, 77)),
    decoding("fewer keys than a block", newest(1, 9, 4), filled(9, 9, 4)),
]  # fmt: skip


def head_size_128(cases):
    return [dataclasses.replace(case, head_dim=128) for case in cases]


class Cache(NamedTuple):
    """Keys and values as stored; with a table, a pool of pages with coordinates of its own."""

    k: jax.Array | Quantized
    v: jax.Array | Quantized
    table: np.ndarray | None = None
    coords: Coords | None = None


def seen(case):
    """Which keys of each row some query sees."""
    return rule(case).any(1)


def stored(x, format):
    """In a format of quantization, or a type."""
    return quantize(x, format) if format in ("int8", "fp8", "int4") else x.astype(format)


def whole(case, format) -> Cache:
    """The keys of each row together; those that nobody sees hold garbage."""
    _, k, v, *_ = draw(case)
    factor = np.where(seen(case), 1, GARBAGE)[:, None, :, None].astype(np.float32)
    return Cache(*(stored(jnp.asarray(x * factor), format) for x in (k, v)))


def in_pages(case, format, page) -> Cache:
    """Pages in any order; page 0 is garbage, of no row, as are those that no table names.

    int4 lies in pairs, as in the model's cache.
    """
    rng, rows = np.random.default_rng(0), len(case.k.position)
    used = seen(case).reshape(rows, -1, page).any(-1)
    shape = used.size + 3, case.heads[1], page, case.head_dim
    k, v = rng.standard_normal((2, *shape)).astype(np.float32)
    table = np.where(used, 1 + rng.permutation(used.size).reshape(used.shape), 0).astype(np.int32)
    free = np.setdiff1d(np.arange(shape[0]), table[used])
    k[free] *= GARBAGE
    v[free] *= GARBAGE
    coords = Coords(*(in_pool(x, table, shape[0], page) for x in case.k))
    coords.segment[0] = 0
    pools = (stored(jnp.asarray(x), format) for x in (k, v))
    return Cache(*(in_pairs(x) if format == "int4" else x for x in pools), table, coords)


def in_pool(x, table, pages, page):
    """Pages that no table names, with coordinates of the first sequence."""
    pool = np.ones((pages, page), np.int32)
    pool[table.ravel()] = x.reshape(-1, page)
    return pool


def as_judged(case, x, table=None):
    """What is stored, as float32 keys [B, K, T, d] with zeros where nobody sees them."""
    x = np.asarray(dequantize(x) if isinstance(x, Quantized) else x).astype(np.float32)
    if table is not None:
        x = x[table].swapaxes(1, 2)
        x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return np.where(seen(case)[:, None, :, None], x, 0)


def judged(case, q, cache: Cache) -> Results:
    _, _, _, *cotangents = draw(case)
    return judge(case, q, *(as_judged(case, x, cache.table) for x in cache[:2]), *cotangents)
