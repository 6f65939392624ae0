"""The checks of `jaxmoe benchmark moe`: every family of cases at a small size, against float32.

The reference multiplies every token with every expert and keeps what it chose.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmarks.checks import largest_errors
from jaxmoe.benchmarks.moe.inputs import persuaded
from jaxmoe.benchmarks.moe.routing import experts_of
from jaxmoe.benchmarks.moe.ways import Blocks
from jaxmoe.benchmarks.tables import ROUTINGS
from pallas_kernels.quantized import dequantize_matrix, quantize_matrix

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the arrays of a check. Numbers of tokens are one for each size of block that there is."""

    experts: int
    width: int
    expert_width: int
    tokens: tuple[int, ...]


FULL = Size(experts=16, width=1024, expert_width=1280, tokens=(1, 300, 600, 1100, 2100, 4200))
TOY = Size(experts=4, width=64, expert_width=32, tokens=(1, 53))


@dataclasses.dataclass(frozen=True)
class Check:
    """One call on random arrays."""

    family: str  # of `moe.cases.Case`
    routing: str  # of ROUTINGS, or "padded": some tokens have no expert
    tokens: int
    size: Size

    @property
    def name(self) -> str:
        return f"{self.family} {self.routing} {self.tokens}"

    @property
    def part(self) -> str:
        return self.family.partition("-")[0]

    @property
    def format(self) -> str:
        """Of the experts' matrices."""
        return self.family.partition("-")[2] or "bf16"

    @property
    def experts(self) -> np.ndarray:
        """Of each token; one too large for padding."""
        if self.routing != "padded":
            return experts_of(self.routing, self.tokens, self.size.experts)
        drawn = experts_of("skewed", self.tokens, self.size.experts)
        return np.where(np.arange(self.tokens) % 3 == 0, self.size.experts, drawn)


def checks_of(family: str, size: Size) -> list[Check]:
    """Each routing that cases of the family may meet, and more."""
    return [
        Check(family, routing, tokens, size)
        for tokens in _tokens_of(family, size)
        for routing in ((*ROUTINGS, "padded") if tokens > 1 else ("random", "padded"))
    ]


def _tokens_of(family: str, size: Size) -> tuple[int, ...]:
    """Each size of block for what is grouped; less for what is made of it, or stored otherwise."""
    if family == "gradients":
        return size.tokens[1:]  # the score's gradient of one token is a sum that cancels
    if family in ("gated", "down"):
        return size.tokens
    return tuple(dict.fromkeys((*size.tokens[:2], size.tokens[-1])))


def errors(check: Check, implementation: str) -> dict[str, float]:
    """Of each result, against the same inputs in float32 by plain XLA."""
    arrays = _random(check)
    way = Blocks(check.size.experts, implementation)
    got = _run(check.part, way, arrays)
    want = _reference(check.part, _exact(arrays))
    return largest_errors(got, want)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "hidden", "score", "expert", "d_out", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Arrays:
    """Of a check: tokens, what `down` takes of each, and a cotangent of the layer's result."""

    x: jax.Array
    hidden: jax.Array
    score: jax.Array
    expert: jax.Array
    d_out: jax.Array
    weights: dict


def _random(check: Check) -> Arrays:
    size, tokens = check.size, check.tokens
    keys = jax.random.split(jax.random.key(zlib.crc32(check.name.encode())), 5)
    x, hidden, d_out = (
        jax.random.normal(key, (tokens, width), jnp.bfloat16)
        for key, width in zip(keys, (size.width, size.expert_width, size.width), strict=False)
    )
    score = jax.random.uniform(keys[3], (tokens,), jnp.bfloat16, 0.1, 1)
    weights, expert = _random_weights(check, keys[4]), jnp.asarray(check.experts)
    if check.part == "layer":
        x = persuaded(x, weights["router"], expert % size.experts)
    return Arrays(x, hidden, score, expert, d_out, weights)


def _random_weights(check: Check, key: jax.Array) -> dict:
    D, F, E = check.size.width, check.size.expert_width, check.size.experts
    keys = iter(jax.random.split(key, 7))

    def matrices(*outer: int) -> dict[str, jax.Array]:
        shapes = {"gate": (*outer, D, F), "up": (*outer, D, F), "down": (*outer, F, D)}
        return {name: _matrix(next(keys), shape) for name, shape in shapes.items()}

    experts, shared = matrices(E), matrices()
    if check.format != "bf16":
        experts = {name: quantize_matrix(w, check.format) for name, w in experts.items()}
    return {"experts": experts, "shared": shared, "router": _matrix(next(keys), (D, E))}


def _matrix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return shape[-2] ** -0.5 * jax.random.normal(key, shape, jnp.bfloat16)


def _exact(arrays: Arrays) -> Arrays:
    """The same in float32."""

    def widened(x):
        if not isinstance(x, jax.Array):
            return dequantize_matrix(x)
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widened, arrays, is_leaf=lambda x: hasattr(x, "qvalue"))


@functools.partial(jax.jit, static_argnames=("part", "way"))
def _run(part: str, way: Blocks, a: Arrays) -> dict[str, jax.Array]:
    """By token."""
    p, plan = a.weights["experts"], way.plan(a.expert)
    scale = way.rows(plan, a.score[:, None])[:, 0]
    if part == "move":
        rows = way.rows(plan, a.x)
        return {"out": way.back(plan, rows), "rows": rows}
    if part == "gated":
        return {"out": way.back(plan, way.gated(p, way.rows(plan, a.x), scale, plan))}
    if part == "down":
        return {"out": way.back(plan, way.down(p, way.rows(plan, a.hidden), plan))}
    if part == "layer":
        return {"out": way.layer(a.weights, a.x, a.expert < way.num_experts)}
    if part == "gradients":
        return _gradients(way.routed, a)
    return {"out": way.routed(p, a.x, a.expert, a.score)}


def _gradients(routed, a: Arrays) -> dict[str, jax.Array]:
    """Of tokens, scores and matrices."""
    _, pull = jax.vjp(
        lambda p, x, score: routed(p, x, a.expert, score), a.weights["experts"], a.x, a.score
    )
    d_experts, dx, d_score = pull(a.d_out)
    return {f"d_{name}": dw for name, dw in d_experts.items()} | {"dx": dx, "d_score": d_score}


@functools.partial(jax.jit, static_argnames="part")
def _reference(part: str, a: Arrays) -> dict[str, jax.Array]:
    p = a.weights["experts"]
    if part == "move":
        return {"out": _chosen(a.x[None], a.expert, len(p["down"]))}
    if part == "gated":
        return {"out": _gated(p, a.x, a.expert, a.score)}
    if part == "down":
        return {"out": _of_each(a.hidden, p["down"], a.expert)}
    if part == "gradients":
        return _gradients(_routed, a)
    if part == "layer":
        score = jax.nn.sigmoid(jnp.max(_einsum("nd,de->ne", a.x, a.weights["router"]), axis=1))
        shared = _routed(_one(a.weights["shared"]), a.x, jnp.zeros_like(a.expert), 1.0 + 0 * score)
        return {"out": shared + _routed(p, a.x, a.expert, score)}
    return {"out": _routed(p, a.x, a.expert, a.score)}


def _one(p: dict) -> dict:
    """A shared expert as the only one of its kind."""
    return {name: w[None] for name, w in p.items()}


def _routed(p: dict, x, expert, score) -> jax.Array:
    return _of_each(_gated(p, x, expert, score), p["down"], expert)


def _gated(p: dict, x, expert, score) -> jax.Array:
    gate, up = (score[:, None] * _of_each(x, p[name], expert) for name in ("gate", "up"))
    return jax.nn.silu(gate) * up


def _of_each(x, w, expert) -> jax.Array:
    """Each token by its expert's matrix; zeros for padding."""
    return _chosen(_einsum("nd,edf->enf", x, w), expert, len(w))


def _chosen(products, expert, experts: int) -> jax.Array:
    member = expert == jnp.arange(experts)[:, None]
    return jnp.sum(jnp.where(member[:, :, None], products, 0), axis=0)


def _einsum(subscripts: str, x, w) -> jax.Array:
    return jnp.einsum(subscripts, x, w, precision=HIGHEST, preferred_element_type=jnp.float32)
