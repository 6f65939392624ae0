"""The cases of `jaxmoe benchmark attention`, and the operations or bytes of each."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.gpu import COLD_BYTES, SPARE_BYTES
from pallas_kernels.attention import Coords, coords_of
from pallas_kernels.quantized import quantize

HEADS, KV_HEADS, HEAD_DIM, CHUNK = 40, 8, 128, 8192
SCALE = HEAD_DIM**-0.5
VECTOR_BYTES = {"bf16": 256, "int8": 128 + 4, "fp8": 128 + 4, "int4": 64 + 4}  # with its scale
TOKENS = {f"{k}k": k * 1024 for k in (2, 8, 16, 32, 64, 128)} | {"1m": 2**20}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of causal attention to time. Its queries are the last tokens of its keys.

    Attributes:
        name: as in the tables.
        kind: "prefill", "backward" or "decode".
        queries: new tokens of each row.
        keys: tokens of each row that are attended to.
        rows: the batch size.
        chunk: the size of attention chunks; None for full attention.
        format: of keys and values, as of VECTOR_BYTES.
    """

    name: str
    kind: str
    queries: int
    keys: int
    rows: int = 1
    chunk: int | None = None
    format: str = "bf16"

    @property
    def family(self) -> str:
        """The name of the kernel that the case runs; cases of a family share their checks."""
        if self.kind == "decode":
            return f"decode-{self.format}"
        shape = "-segment" if self.queries < self.keys else ""
        return f"{self.kind}{shape}{'-chunked' if self.chunk else ''}"

    @property
    def facts(self) -> dict:
        """The case's fields in the file of figures."""
        return dataclasses.asdict(self)

    @property
    def work(self) -> dict[str, int | float]:
        """Bytes of cache, or operations on visible pairs of query and key, by the rate's unit."""
        if self.kind == "decode":
            return {"TB/s": self.cache_bytes}
        pairs = self.rows * visible_pairs(self.queries, self.keys, self.chunk)
        forward = 4 * HEADS * HEAD_DIM * pairs  # two products of multiply-adds
        return {"TFLOP/s": forward * (2.5 if self.kind == "backward" else 1)}

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values, with their scales."""
        return 2 * self.rows * KV_HEADS * self.keys * VECTOR_BYTES[self.format]

    @property
    def sets(self) -> int:
        """How many caches to read in rotation so that none stays in the L2 cache."""
        return math.ceil(COLD_BYTES / self.cache_bytes) if self.kind == "decode" else 1

    @property
    def memory(self) -> int:
        """An estimate of the bytes of caches, queries, outputs and their gradients."""
        tokens = 2 * self.rows * self.queries * HEADS * HEAD_DIM * 2
        return (self.sets * self.cache_bytes + tokens) * (3 if self.kind == "backward" else 1)

    def left_out(self, memory: int) -> str | None:
        """Says why the case does not run on a device with `memory` bytes; None if it does."""
        if self.sets * self.cache_bytes + SPARE_BYTES <= memory:
            return None
        return (
            f"{self.name} is left out: its cache of {self.cache_bytes / 1e9:.1f} GB does not fit "
            f"in the {memory / 1e9:.1f} GB that JAX may use."
        )


def visible_pairs(queries: int, keys: int, chunk: int | None = None) -> int:
    """The number of pairs of a query and a key that it sees, where queries are the last keys."""
    return _pairs(keys, chunk) - _pairs(keys - queries, chunk)


def _pairs(tokens: int, chunk: int | None) -> int:
    """The number of visible pairs of the first tokens with themselves."""
    whole, rest = divmod(tokens, chunk) if chunk else (0, tokens)
    return whole * _triangle(chunk or 0) + _triangle(rest)


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    return [*_prefill(), *_backward(), *_decode()]


def _prefill():
    for size in ("2k", "8k", "32k", "64k", "128k"):
        tokens = TOKENS[size]
        if size != "64k":
            yield Case(f"prefill-{size}", "prefill", tokens, tokens)
        yield Case(f"prefill-{size}-chunked", "prefill", tokens, tokens, chunk=CHUNK)
    yield Case("prefill-8k-of-128k", "prefill", TOKENS["8k"], TOKENS["128k"])


def _backward():
    for size in ("2k", "8k", "16k"):
        yield Case(f"backward-{size}", "backward", TOKENS[size], TOKENS[size])
    yield Case("backward-32k-chunked", "backward", TOKENS["32k"], TOKENS["32k"], chunk=CHUNK)


def _decode():
    for size in ("8k", "128k", "1m"):
        for rows in (1, 8, 64):
            for format in VECTOR_BYTES:
                name = f"decode-{size}-b{rows}-{format}"
                yield Case(name, "decode", 1, TOKENS[size], rows, format=format)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random arguments of a case.

    Attributes:
        q: queries [B, H, S, d].
        caches: for each of the case's sets (k, v), each [B, K, T, d], perhaps quantized.
        coords: coordinates of the queries and of the keys.
    """

    q: jax.Array
    caches: list[tuple]
    coords: tuple[Coords, Coords]


def random_inputs(case: Case) -> Inputs:
    """Random arrays of the case's shapes and formats, with coordinates as the model has them."""
    q_key, *keys = jax.random.split(jax.random.key(0), 1 + 2 * case.sets)
    shape = case.rows, HEADS, case.queries, HEAD_DIM
    tokens = [_random_tokens(case, key) for key in keys]
    return Inputs(
        jax.random.normal(q_key, shape, jnp.bfloat16),
        list(zip(tokens[::2], tokens[1::2], strict=True)),
        (
            coords_of(case.rows, case.queries, start=case.keys - case.queries),
            coords_of(case.rows, case.keys),
        ),
    )


def _random_tokens(case: Case, key: jax.Array):
    """Random keys or values; tokens repeat, so that drawing takes little memory beyond them."""
    block = jax.random.normal(key, (1, KV_HEADS, min(case.keys, CHUNK), HEAD_DIM), jnp.bfloat16)
    stored = block if case.format == "bf16" else quantize(block, case.format)

    def repeated(x: jax.Array) -> jax.Array:
        _, heads, tokens, *rest = x.shape
        shape = case.rows, heads, case.keys // tokens, tokens, *rest
        return jnp.broadcast_to(x[:, :, None], shape).reshape(case.rows, heads, case.keys, *rest)

    return jax.jit(lambda stored: jax.tree.map(repeated, stored))(stored)
