"""The contenders of `jaxmoe benchmark moe`: jaxmoe's kernels, ragged_dot, dense, transformers.

A builder makes a contender's `Call`, and is absent if its library cannot express the case. The
argument `contender` of the functions here is an object of a class of `jaxmoe.benchmarks.moe.ways`.
"""

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.moe.cases import PARTS, Case, widths
from jaxmoe.benchmarks.moe.inputs import Inputs
from jaxmoe.benchmarks.moe.ways import Blocks, Dense, Ragged
from jaxmoe.benchmarks.timing import Call, torch_with_cuda


def builders(case: Case, inputs: Inputs, implementation: str) -> dict[str, Callable[[], Call]]:
    """The functions that make the calls to time on a case, by contender."""
    E = case.config.num_local_experts
    ours = Blocks(E, implementation)
    calls = {
        "jaxmoe": lambda: _call(case, inputs, ours),
        "xla": lambda: _call(case, inputs, Blocks(E, "xla")),
    }
    if case.format == "bf16":
        calls["ragged"] = lambda: _call(case, inputs, Ragged(E))
    if case.format == "bf16" and case.part not in ("move", "layer"):  # products only
        calls["dense"] = lambda: _call(case, inputs, Dense(E, case.active))
    if case.part not in ("move", "layer"):  # a layer's own router would choose other groups
        calls["longest"] = lambda: _call(case, only_longest(case, inputs), ours)
    if case.part == "layer" and (torch := torch_with_cuda()) and find_spec("transformers"):
        calls["transformers"] = lambda: _transformers_call(torch, case, inputs)
    names = tables.MOE_CONTENDERS | tables.LONGEST
    return {name: calls[name] for name in names if name in calls}


def only_longest(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with the tokens of all but the longest group assigned to no expert."""
    E = case.config.num_local_experts
    first = int(np.bincount(case.experts).argmax())
    longest = [(first + i) % E for i in range(case.sets)]
    pairs = zip(inputs.experts, longest, strict=True)
    experts = [jnp.where(expert == kept, expert, E) for expert, kept in pairs]
    return Inputs(inputs.x, inputs.router_weight, experts, inputs.weights)


class Arguments(NamedTuple):
    """The arguments of one call; None for those that its part of a layer does not take.

    Attributes:
        weights: the layer's parameters.
        plan: which row each token takes, in the contender's own form.
        x: rows in the order of the plan; tokens, if moving them is part of the call.
        scale: the router weight of each row or token.
        expert: the expert of each token.
        dy: the cotangent of the result.
    """

    weights: dict
    plan: Any = None
    x: Any = None
    scale: jax.Array | None = None
    expert: jax.Array | None = None
    dy: jax.Array | None = None


def _call(case: Case, inputs: Inputs, contender) -> Call:
    """Times a case on all of its sets in sequence, as in the layers of a model."""
    sets = [arguments(case, inputs, contender, i) for i in range(len(inputs.experts))]
    run = _compiled(case.part, contender)
    return Call(lambda: run(sets), count=len(sets))


@functools.cache  # cases that differ only in routing share a compilation
def _compiled(part: str, contender) -> Callable[[list[Arguments]], list]:
    run = functools.partial(_PARTS[part], contender)
    return jax.jit(lambda sets: [run(a) for a in sets])


def arguments(case: Case, inputs: Inputs, contender, number: int) -> Arguments:
    """The arguments for one of the sets, by number.

    What a layer computes once for all of its products, such as the plan, is computed here and not
    timed.
    """
    weights = contender.weights(inputs.weights, number)
    expert = inputs.experts[number]
    if case.part in ("move", "routed", "layer"):
        return Arguments(weights, None, inputs.x, inputs.router_weight, expert)
    plan = contender.plan(expert)
    rows = contender.rows(plan, inputs.x)
    if case.part == "gated":
        scale = contender.rows(plan, inputs.router_weight[:, None])[:, 0]
        return Arguments(weights, plan, rows, scale)
    F = case.config.intermediate_size
    hidden_key, dy_key = jax.random.split(jax.random.key(1))
    hidden = jax.random.normal(hidden_key, (len(rows), contender.across * F), rows.dtype)
    dy = jax.random.normal(dy_key, rows.shape, rows.dtype) if case.part in ("dx", "dw") else None
    return Arguments(weights, plan, hidden, dy=dy)


def _gated(contender, a: Arguments) -> jax.Array:
    return contender.gated(a.weights["experts"], a.x, a.scale, a.plan)


def _down(contender, a: Arguments) -> jax.Array:
    return contender.down(a.weights["experts"], a.x, a.plan)


def _dx(contender, a: Arguments) -> jax.Array:
    """The gradient of `down` by its rows; the compiler drops the product itself as unused."""
    return jax.vjp(lambda x: contender.down(a.weights["experts"], x, a.plan), a.x)[1](a.dy)[0]


def _dw(contender, a: Arguments) -> dict:
    """The gradient of `down` by its matrices; the compiler drops the product itself as unused."""
    return jax.vjp(lambda p: contender.down(p, a.x, a.plan), a.weights["experts"])[1](a.dy)[0]


def _move(contender, a: Arguments) -> tuple[jax.Array, jax.Array]:
    """Plans, moves tokens to rows and back; returns the rows too, so that they are computed."""
    plan = contender.plan(a.expert)
    rows = contender.rows(plan, a.x)
    return rows, contender.back(plan, rows)


def _routed(contender, a: Arguments) -> jax.Array:
    return contender.routed(a.weights["experts"], a.x, a.expert, a.scale)


def _layer(contender, a: Arguments) -> jax.Array:
    return contender.layer(a.weights, a.x, jnp.ones(a.x.shape[0], bool))


_PARTS = {
    "gated": _gated,
    "down": _down,
    "dx": _dx,
    "dw": _dw,
    "move": _move,
    "routed": _routed,
    "layer": _layer,
}
assert _PARTS.keys() == PARTS.keys()


def _transformers_call(torch, case: Case, inputs: Inputs) -> Call:
    layer = transformers_layer(torch, case.config, inputs.weights)
    x = torch.from_dlpack(inputs.x)

    def start():
        with torch.no_grad():
            return layer(x)

    return Call(start, lambda _: torch.cuda.synchronize())


def transformers_layer(torch, config, weights: dict):
    """transformers' Llama4TextMoe with these weights, which it shares with JAX."""
    llama4 = importlib.import_module("transformers.models.llama4.modeling_llama4")
    D, F, E = widths(config)
    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": E}
    with torch.device("meta"):
        layer = llama4.Llama4TextMoe(llama4.Llama4TextConfig(**sizes, num_experts_per_tok=1))
    experts, shared = weights["experts"], weights["shared"]
    gate_up = jnp.concatenate([experts["gate"], experts["up"]], axis=-1)
    state = {"experts.gate_up_proj": gate_up, "experts.down_proj": experts["down"]}
    transposed = {"router.weight": weights["router"]}
    transposed |= {f"shared_expert.{name}_proj.weight": w for name, w in shared.items()}
    tensors = {name: torch.from_dlpack(x) for name, x in state.items()}
    tensors |= {name: torch.from_dlpack(x).T for name, x in transposed.items()}
    layer.load_state_dict(tensors, assign=True)
    return layer
