"""The checks of `jaxmoe benchmark moe`: each family of cases at a small size against float32.

The reference multiplies every token by every expert's matrices, and selects the expert that the
token chose.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmarks.checks import largest_errors
from jaxmoe.benchmarks.moe.inputs import steer_to_experts
from jaxmoe.benchmarks.moe.routing import experts_of
from jaxmoe.benchmarks.moe.ways import Blocks
from jaxmoe.benchmarks.tables import ROUTINGS
from pallas_kernels.quantized import dequantize_matrix, quantize_matrix

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a check's arrays; `tokens` has a number for each block size of the kernels."""

    experts: int
    width: int
    expert_width: int
    tokens: tuple[int, ...]


FULL = Size(experts=16, width=1024, expert_width=1280, tokens=(1, 100, 200, 300, 1100, 4200))
TOY = Size(experts=4, width=64, expert_width=32, tokens=(1, 53))


@dataclasses.dataclass(frozen=True)
class Check:
    """A call on random arrays to compare with a reference.

    Attributes:
        family: of `moe.cases.Case`.
        routing: one of ROUTINGS, or "padded", in which some tokens have no expert.
        tokens: how many tokens there are.
        size: sizes of the arrays.
    """

    family: str
    routing: str
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
        """The format of the experts' matrices."""
        return self.family.partition("-")[2] or "bf16"

    @property
    def experts(self) -> np.ndarray:
        """The expert of each token, [tokens]; the number of experts for padding."""
        if self.routing != "padded":
            return experts_of(self.routing, self.tokens, self.size.experts)
        drawn = experts_of("skewed", self.tokens, self.size.experts)
        return np.where(np.arange(self.tokens) % 3 == 0, self.size.experts, drawn)


def checks_of(family: str, size: Size) -> list[Check]:
    """The checks of a family: one for each routing and number of tokens."""
    return [
        Check(family, routing, tokens, size)
        for tokens in _tokens_of(family, size)
        for routing in ((*ROUTINGS, "padded") if tokens > 1 else ("random", "padded"))
    ]


def _tokens_of(family: str, size: Size) -> tuple[int, ...]:
    """The numbers of tokens to check: every block size for grouped products, fewer for others."""
    if family == "gradients":
        return size.tokens[1:]  # a lone token's router weight has a gradient that cancels to noise
    if family in ("gated", "down"):
        return size.tokens
    return tuple(dict.fromkeys((*size.tokens[:2], size.tokens[-1])))


def errors(check: Check, implementation: str) -> dict[str, float]:
    """The largest error of each result against XLA's on the same inputs in float32."""
    arrays = _random(check)
    contender = Blocks(check.size.experts, implementation)
    got = _run(check.part, contender, arrays)
    want = _reference(check.part, _exact(arrays))
    return largest_errors(got, want)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "hidden", "router_weight", "expert", "d_out", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Arrays:
    """Random arrays of a check.

    Attributes:
        x: tokens [T, D].
        hidden: hidden values [T, F], the input of `down`.
        router_weight: [T].
        expert: the expert of each token, [T].
        d_out: a cotangent of the layer's result, [T, D].
        weights: the layer's parameters.
    """

    x: jax.Array
    hidden: jax.Array
    router_weight: jax.Array
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
    router_weight = jax.random.uniform(keys[3], (tokens,), jnp.bfloat16, 0.1, 1)
    weights, expert = _random_weights(check, keys[4]), jnp.asarray(check.experts)
    if check.part == "layer":
        x = steer_to_experts(x, weights["router"], expert % size.experts)
    return Arrays(x, hidden, router_weight, expert, d_out, weights)


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
    """The arrays in float32, with quantized matrices dequantized."""

    def widened(x):
        if not isinstance(x, jax.Array):
            return dequantize_matrix(x)
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widened, arrays, is_leaf=lambda x: hasattr(x, "qvalue"))


@functools.partial(jax.jit, static_argnames=("part", "contender"))
def _run(part: str, contender: Blocks, a: Arrays) -> dict[str, jax.Array]:
    """The results of a part of the layer, by name, in the order of tokens."""
    p, plan = a.weights["experts"], contender.plan(a.expert)
    scale = contender.rows(plan, a.router_weight[:, None])[:, 0]
    if part == "move":
        rows = contender.rows(plan, a.x)
        return {"out": contender.back(plan, rows), "rows": rows}
    if part == "gated":
        return {
            "out": contender.back(plan, contender.gated(p, contender.rows(plan, a.x), scale, plan))
        }
    if part == "down":
        return {
            "out": contender.back(plan, contender.down(p, contender.rows(plan, a.hidden), plan))
        }
    if part == "layer":
        return {"out": contender.layer(a.weights, a.x, a.expert < contender.num_experts)}
    if part == "gradients":
        return _gradients(contender.routed, a)
    return {"out": contender.routed(p, a.x, a.expert, a.router_weight)}


def _gradients(routed, a: Arrays) -> dict[str, jax.Array]:
    """Gradients by name: those of the matrices, of the tokens and of the router weights."""
    _, pull = jax.vjp(
        lambda p, x, weight: routed(p, x, a.expert, weight),
        *(a.weights["experts"], a.x, a.router_weight),
    )
    d_experts, dx, d_weight = pull(a.d_out)
    return {f"d_{name}": dw for name, dw in d_experts.items()} | {"dx": dx, "d_score": d_weight}


@functools.partial(jax.jit, static_argnames="part")
def _reference(part: str, a: Arrays) -> dict[str, jax.Array]:
    p = a.weights["experts"]
    if part == "move":
        return {"out": _chosen(a.x[None], a.expert, len(p["down"]))}
    if part == "gated":
        return {"out": _gated(p, a.x, a.expert, a.router_weight)}
    if part == "down":
        return {"out": _product(a.hidden, p["down"], a.expert)}
    if part == "gradients":
        return _gradients(_routed, a)
    if part == "layer":
        weight = jax.nn.sigmoid(jnp.max(_einsum("nd,de->ne", a.x, a.weights["router"]), axis=1))
        only = {name: w[None] for name, w in a.weights["shared"].items()}
        shared = _routed(only, a.x, jnp.zeros_like(a.expert), jnp.ones_like(weight))
        return {"out": shared + _routed(p, a.x, a.expert, weight)}
    return {"out": _routed(p, a.x, a.expert, a.router_weight)}


def _routed(p: dict, x, expert, router_weight) -> jax.Array:
    return _product(_gated(p, x, expert, router_weight), p["down"], expert)


def _gated(p: dict, x, expert, router_weight) -> jax.Array:
    gate, up = (router_weight[:, None] * _product(x, p[name], expert) for name in ("gate", "up"))
    return jax.nn.silu(gate) * up


def _product(x, w, expert) -> jax.Array:
    """Each token multiplied by its expert's matrix; zeros for padding."""
    return _chosen(_einsum("nd,edf->enf", x, w), expert, len(w))


def _chosen(products, expert, experts: int) -> jax.Array:
    member = expert == jnp.arange(experts)[:, None]
    return jnp.sum(jnp.where(member[:, :, None], products, 0), axis=0)


def _einsum(subscripts: str, x, w) -> jax.Array:
    return jnp.einsum(subscripts, x, w, precision=HIGHEST, preferred_element_type=jnp.float32)
