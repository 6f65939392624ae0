"""The checks of `jaxmoe benchmark attention`: each family of cases at a small size against float32.

They have more kinds of masks than the cases: packed and padded rows, offsets, chunk edges, empty
rows.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmarks.checks import largest_errors
from pallas_kernels.attention import Coords, coords_of, flash_attention
from pallas_kernels.quantized import dequantize, quantize

ROWS = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a check's arrays; neither tokens nor chunk are multiples of a kernel's block."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    chunk: int


FULL = Size(heads=40, kv_heads=8, head_dim=128, tokens=1000, chunk=330)
TOY = Size(heads=10, kv_heads=2, head_dim=16, tokens=53, chunk=16)


@dataclasses.dataclass(frozen=True)
class Check:
    """A call on random arrays to compare with a reference.

    Attributes:
        family: of `attention.cases.Case`.
        masks: the name of the layout of tokens.
        q: coordinates of the queries.
        k: coordinates of the keys.
        size: sizes of the arrays.
        chunk: the size of attention chunks, or None.
    """

    family: str
    masks: str
    q: Coords
    k: Coords
    size: Size
    chunk: int | None

    @property
    def name(self) -> str:
        return f"{self.family} {self.masks}"

    @property
    def format(self) -> str:
        """The format of keys and values."""
        kind, _, rest = self.family.partition("-")
        return rest if kind == "decode" else "bf16"


def checks_of(family: str, size: Size) -> list[Check]:
    """The checks of a family: one for each layout of tokens."""
    kind = family.partition("-")[0]
    layouts = _decode_layouts(size) if kind == "decode" else _layouts(size)
    if "segment" in family:
        layouts = _segment_layouts(size)
    if kind == "decode":  # also with chunks, since a local layer's cache holds older chunks too
        return [
            Check(family, f"{name}, {masks}", *layouts[name], size, chunk)
            for name in layouts
            for masks, chunk in (("full", None), ("chunked", size.chunk))
        ]
    chunk = size.chunk if "chunked" in family else None
    return [Check(family, name, *layouts[name], size, chunk) for name in layouts]


def _layouts(size: Size) -> dict[str, tuple[Coords, Coords]]:
    """Coordinates of queries and keys that are the same tokens, by the layout's name."""
    tokens, chunk = size.tokens, size.chunk
    plain = coords_of(ROWS, tokens)
    far = coords_of(ROWS, tokens, start=jnp.array([chunk - 1, chunk, 30 * chunk + 1]))
    ragged = coords_of(ROWS, tokens, lengths=jnp.array([tokens, tokens // 3, 0]))
    left = Coords(*(x[:, ::-1] for x in ragged))._replace(position=plain.position)
    same = {"plain": plain, "far": far, "ragged": ragged, "left-padded": left}
    same["packed"] = _packed(tokens)
    rotated = plain, _rotated(plain)
    return {name: (x, x) for name, x in same.items()} | {"turned": rotated}


def _packed(tokens: int) -> Coords:
    """Coordinates of packed rows: uneven segments, padding between them, segments of one token."""
    cuts = np.array([[0.1, 0.45, 0.5, 0.9], [0.02, 0.02, 0.6, 1.0], [0.25, 0.5, 0.75, 1.0]])
    starts = np.concatenate([np.zeros((ROWS, 1)), cuts * tokens], axis=1).astype(np.int32)
    index = np.broadcast_to(np.arange(tokens, dtype=np.int32), (ROWS, tokens))
    number = (index[:, :, None] >= starts[:, None]).sum(-1) - 1
    position = index - np.take_along_axis(starts, number, axis=1)
    segment = np.where(number == 2, 0, number + 1).astype(np.int32)
    return Coords(jnp.asarray(position), jnp.asarray(segment))


def _rotated(coords: Coords) -> Coords:
    """Coordinates with each row rotated by a third of its slots, as in a ring buffer."""
    return Coords(*(jnp.roll(x, x.shape[1] // 3, axis=1) for x in coords))


def _segment_layouts(size: Size) -> dict[str, tuple[Coords, Coords]]:
    """Coordinates of queries that are the last keys, as in chunked prefill, by layout."""
    tokens, queries = size.tokens, size.tokens // 4
    lengths = jnp.array([tokens, tokens - tokens // 8, queries + 1])
    keys = coords_of(ROWS, tokens, lengths=lengths)
    return {
        "last": (coords_of(ROWS, queries, start=tokens - queries), coords_of(ROWS, tokens)),
        "ragged": (coords_of(ROWS, queries, start=lengths - queries), keys),
        "turned": (coords_of(ROWS, queries, start=lengths - queries), _rotated(keys)),
    }


def _decode_layouts(size: Size) -> dict[str, tuple[Coords, Coords]]:
    """Coordinates of one or a few queries and of a cache's keys, by layout."""
    tokens, chunk = size.tokens, size.chunk
    lengths = jnp.array([tokens, chunk + 1, 1])
    keys = coords_of(ROWS, tokens, lengths=lengths)
    last = coords_of(ROWS, 1, start=lengths - 1)
    empty = coords_of(ROWS, tokens, lengths=jnp.array([tokens, 0, chunk]))
    return {
        "plain": (coords_of(ROWS, 1, start=tokens - 1), coords_of(ROWS, tokens)),
        "ragged": (last, keys),
        "turned": (last, _rotated(keys)),
        "with an empty row": (coords_of(ROWS, 1, start=tokens - 1), empty),
        "four queries": (coords_of(ROWS, 4, start=tokens - 4), coords_of(ROWS, tokens)),
    }


def errors(check: Check, implementation: str) -> dict[str, float]:
    """The largest error of each result against XLA's on the same inputs in float32."""
    kind = check.family.partition("-")[0]
    run = {"prefill": _outputs, "backward": _gradients, "decode": _decoded}[kind]
    reference = _gradients if kind == "backward" else _outputs
    inputs = _random(check)
    exact = [_float32(x) for x in inputs]
    options = {"scale": check.size.head_dim**-0.5, "chunk": check.chunk}
    got = run(*inputs, check.q, check.k, implementation=implementation, **options)
    want = reference(*exact, check.q, check.k, implementation="xla", **options)
    return largest_errors(got, want)


def _random(check: Check) -> tuple:
    size, keys = check.size, jax.random.split(jax.random.key(zlib.crc32(check.name.encode())), 4)
    q_shape = ROWS, size.heads, check.q.position.shape[1], size.head_dim
    k_shape = ROWS, size.kv_heads, check.k.position.shape[1], size.head_dim
    shapes = q_shape, k_shape, k_shape, q_shape
    q, k, v, d_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    if check.format != "bf16":
        k, v = (quantize(x, check.format) for x in (k, v))
    return q, k, v, d_out


def _float32(x) -> jax.Array:
    return x.astype(jnp.float32) if isinstance(x, jax.Array) else dequantize(x)


_compiled = functools.partial(jax.jit, static_argnames=("scale", "chunk", "implementation"))


@_compiled
def _outputs(q, k, v, d_out, q_coords, k_coords, **options):
    del d_out
    return _flash(q, k, v, q_coords, k_coords, options)


def _flash(q, k, v, q_coords, k_coords, options) -> dict[str, jax.Array]:
    out, lse = flash_attention(q, k, v, q_coords, k_coords, return_lse=True, **options)
    return {"out": out, "lse": lse}


@_compiled
def _gradients(q, k, v, d_out, q_coords, k_coords, **options):
    """Outputs and gradients; cotangents reach the output and the finite log-sum-exps."""
    outputs, pull = jax.vjp(lambda q, k, v: _flash(q, k, v, q_coords, k_coords, options), q, k, v)
    d_lse = jnp.where(outputs["lse"] > -jnp.inf, d_out[..., 0].astype(jnp.float32), 0)
    gradients = pull({"out": d_out.astype(outputs["out"].dtype), "lse": d_lse})
    return outputs | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


@_compiled
def _decoded(q, k, v, d_out, q_coords, k_coords, **options):
    from pallas_kernels.attention.decode import decode_attention

    del d_out
    out, lse = decode_attention(q, k, v, q_coords, k_coords, return_lse=True, **options)
    return {"out": out, "lse": lse}
