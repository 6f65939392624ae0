"""How much one MoE layer computes: what its tokens need, however many experts there are.

XLA counts a loop's body once, so the products of a layer are counted from its jaxpr, where loops
over blocks have a known length; a test holds that count to XLA's. Blocks without rows, which are
skipped when the layer runs, are counted too. Kernels multiply the same blocks as these loops
(`group_of_block` says which), so the formula holds for them, but their own work is not measured.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxmoe.model.moe import moe
from jaxmoe.model.params import map_specs, moe_specs
from pallas_kernels.experts import block_rows, make_group_metadata
from tests.model import moe_layer

D, F, T = 256, 512, 2**19  # many tokens, so that one block of padding an expert is little
BLOCK = 128  # rows: the largest there is


def arguments(config, tokens):
    """Shapes only: nothing of this size is computed."""
    p = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), moe_specs(config))
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.float32)
    return p, x, jax.ShapeDtypeStruct((1, tokens), jnp.bool_)


def product_flops(function, *arguments, whole_loops=True):
    """Floating point operations of all matmuls, two for each multiplication.

    Args:
        whole_loops: False counts the body of each loop once, as XLA does.
    """

    def count(jaxpr):
        return sum(count_one(equation) for equation in jaxpr.eqns)

    def count_one(equation):
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in summed)
        inner = [count(jaxpr) for jaxpr in jaxprs_in_params(params)]
        if name == "cond":
            return max(inner)
        assert name != "while" or not any(inner), "a loop of unknown length multiplies matrices"
        return sum(inner) * (params["length"] if name == "scan" and whole_loops else 1)

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def layer_flops(layer, config, tokens, **options):
    return product_flops(functools.partial(layer, config), *arguments(config, tokens), **options)


def needed(config, tokens):
    """Three matmuls for each expert of a token and for the shared one, and the router."""
    D, F = config.hidden_size, config.intermediate_size
    experts = config.num_experts_per_tok + 1
    return tokens * (6 * experts * D * F + 2 * D * config.num_local_experts)


def check(layer, config, tokens):
    assert layer_flops(layer, config, tokens) == pytest.approx(needed(config, tokens), rel=0.05)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("E", [16, 128])
@pytest.mark.parametrize("tokens", [T, 2 * T])
def test_work_is_that_of_the_tokens(tokens, E, k):
    """Within 5%, so it is proportional to tokens and the experts' part knows nothing of E."""
    check(moe, moe_layer.config(k, D=D, F=F, E=E), tokens)


def test_more_experts_are_no_more_work():
    """All that 112 further experts add, but for the router, is their share of padding."""
    few, many = (moe_layer.config(D=D, F=F, E=E) for E in (16, 128))
    work = [layer_flops(moe, c, T) - 2 * T * D * c.num_local_experts for c in (few, many)]
    assert 0 <= work[1] - work[0] <= 112 * BLOCK * 6 * D * F < 0.02 * work[0]


def every_expert_on_every_token(config, p, x, real):
    """As transformers computes it."""
    logits = x @ p["router"]
    least = jax.lax.top_k(logits, config.num_experts_per_tok)[0][..., -1:]
    scores = jnp.where(logits >= least, jax.nn.sigmoid(logits), 0)
    rows = jnp.moveaxis(scores, -1, 0)[..., None] * x[None]
    gate, up = (jnp.einsum("EBSD,EDF->EBSF", rows, p["experts"][name]) for name in ("gate", "up"))
    out = jnp.einsum("EBSF,EFD->BSD", jax.nn.silu(gate) * up, p["experts"]["down"])
    shared = jax.nn.silu(x @ p["shared"]["gate"]) * (x @ p["shared"]["up"])
    return out + shared @ p["shared"]["down"]


def test_work_of_every_expert_on_every_token_is_seen():
    """Catches a check that nothing fails, though its answer is the right one."""
    small = moe_layer.config(2)
    p, x, real = moe_layer.draw(small, 2, 9)
    real = jnp.ones_like(real)
    out, _ = moe(small, p, x, real)
    np.testing.assert_allclose(every_expert_on_every_token(small, p, x, real), out, atol=1e-5)
    with pytest.raises(AssertionError):
        check(every_expert_on_every_token, moe_layer.config(D=D, F=F, E=16), T)


@pytest.mark.reads_compiled
@pytest.mark.parametrize("layer", [moe, every_expert_on_every_token])
def test_the_count_is_xlas(layer):
    """XLA counts the compiled layer, a loop's body once, and additions of single numbers too."""
    config = moe_layer.config(D=D, F=F, E=16)
    lowered = jax.jit(functools.partial(layer, config)).lower(*arguments(config, 4096))
    ours = layer_flops(layer, config, 4096, whole_loops=False)
    assert lowered.compile().cost_analysis()["flops"] == pytest.approx(ours, rel=0.05)


ROUTINGS = {
    "balanced": lambda rng, N, E: np.arange(N) % E,
    "random": lambda rng, N, E: rng.integers(E, size=N),
    "skewed": lambda rng, N, E: np.minimum(rng.geometric(0.3, size=N) - 1, E - 1),
    "all to one": lambda rng, N, E: np.full(N, E - 1),
}


def busy_blocks(routing, N, E):
    """Blocks of rows that meet a matrix, and the rows of a block."""
    group = ROUTINGS[routing](np.random.default_rng(0), N, E)
    block = block_rows(N, E)
    plan = make_group_metadata(jnp.asarray(group, jnp.int32), E, block)
    assert (np.asarray(plan.row_of_item) < plan.item_of_row.size).all()  # no item is left out
    return int((np.asarray(plan.group_of_block) < E).sum()), block


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("E", [16, 128])
@pytest.mark.parametrize("N", [1, 37, 1000, 16384])
def test_skew_costs_at_most_a_block_an_expert(N, E, routing):
    busy, block = busy_blocks(routing, N, E)
    assert -(-N // block) <= busy <= -(-N // block) + E


@pytest.mark.parametrize("E", [16, 128])
@pytest.mark.parametrize("N", [1, 37, 1000, 16384])
def test_all_to_one_is_no_more_work_than_balanced(N, E):
    (one, block), (balanced, _) = (busy_blocks(name, N, E) for name in ("all to one", "balanced"))
    assert one == -(-N // block) <= balanced
