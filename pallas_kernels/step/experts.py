"""A mixture of experts for few tokens: applies every busy expert and the shared one to all tokens.

Multiplying by a matrix takes as long for 64 tokens as for one, because reading it is the
bottleneck. So tokens are neither sorted nor moved: each busy expert multiplies all tokens, and its
results for tokens that did not choose it are discarded.

Shape letters: T tokens, C tokens rounded up to 8, D embed, F feed-forward width, E experts on this
device, N busy experts with the shared one last; m the 64 rows of a tile, n a tile of 64 outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.arrays import pad_axis
from pallas_kernels.mosaic import (
    ROWS,
    WARPGROUP,
    WGMMA,
    Ring,
    along_rows,
    full,
    hopper_kernel,
    tile,
)
from pallas_kernels.step.matmul import SLOTS, STEP, UNIT, pad_tokens, products, tokens_tile
from pallas_kernels.step.tpu_experts import Known, down_tpu, gate_up_tpu
from pallas_kernels.tpu import why_not_tpu

GATED_SLOTS = 6  # pipeline depth in steps, where a step has a tile of both gate and up


def busy_experts(
    expert: Int[Array, "T"], num_experts: int, shared: Bool[Array, ""] | bool = True
) -> Int[Array, "N"]:
    """Lists the experts of this device that some token chose; N is min(T, num_experts) + 1.

    The list is neither sorted nor compact: unused entries are `num_experts`. With fewer tokens than
    experts, entry t is the expert of token t, if no token before chose the same; otherwise entry e
    is expert e, if any token chose it. The last entry stands for the shared expert, and is 0.

    Args:
        expert: the expert of each token; negative or at least `num_experts` if another device has
            it.
        num_experts: E.
        shared: whether this device computes the shared expert.
    """
    here = (expert >= 0) & (expert < num_experts)
    if len(expert) < num_experts:
        index = jnp.arange(len(expert))
        seen = jnp.any((expert[None] == expert[:, None]) & (index[None] < index[:, None]), axis=1)
        routed = jnp.where(here & ~seen, expert, num_experts)
    else:
        every = jnp.arange(num_experts)
        routed = jnp.where(jnp.any(expert[None] == every[:, None], axis=1), every, num_experts)
    last = jnp.where(shared, 0, num_experts)
    return jnp.append(routed, last).astype(jnp.int32)


def experts_gate_up(
    x: Float[Array, "T D"],
    routed: tuple[Any, Any] | None,
    shared: tuple[Any, Any],
    expert: Int[Array, "T_or_more"],
    router_weight: Float[Array, "T_or_more"],
    busy: Int[Array, "N_or_more"],
    *,
    interpret=None,
) -> Float[Array, "N C F"]:
    """Hidden values of each busy expert: silu(s * x @ gate) * (s * x @ up).

    They are zero for tokens that chose another expert. The experts are in the order of `busy`; on
    TPUs those that tokens chose come first, in the order of the tokens, then the shared one, and N
    counts the tokens in `x` only.

    Args:
        x: tokens, bfloat16.
        routed: gate and up of the routed experts, [E, D, F]; None for a dense layer, which is
            computed as a shared expert alone. On TPUs they may be `QuantizedMatrix`, here as below.
        shared: gate and up of the shared expert, [D, F].
        expert: the expert of each token, as of `busy_experts`; what follows is of no token.
        router_weight: s for each token's routed expert; s is 1 for the shared expert.
        busy: from `busy_experts`.
        interpret: parameters of an interpreter, or None.
    """
    if why_not_tpu(interpret) is None:
        known = Known(expert, router_weight, busy[-1:])
        return gate_up_tpu(x, routed, shared, known, interpret=interpret)
    C, F = -(-x.shape[0] // UNIT) * UNIT, shared[0].shape[1]
    matrix = tile(GATED_SLOTS, STEP, STEP)
    kernel = hopper_kernel(
        _gate_up_kernel,
        out_type=jax.ShapeDtypeStruct((busy.shape[0], C, F), x.dtype),
        scratch_types=(
            Ring.types((tile(GATED_SLOTS, WARPGROUP, STEP), matrix, matrix), 1),
            tile(WARPGROUP, STEP),
        ),
        grid=(busy.shape[0], F // STEP),
        grid_names=("busy", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="experts_gate_up",
    )
    padded = _pad_to_64(expert, router_weight)
    return kernel(pad_tokens(x), routed or (), shared, *padded, busy)


def _gate_up_kernel(x_TD, routed, shared, expert_m, weight_m, busy_N, out_NCF, ring, out_mn):
    index, warpgroup = lax.axis_index("busy"), lax.axis_index("warpgroup")
    ring, tokens = Ring(*ring), tokens_tile("tile")
    outputs = pl.ds(lax.axis_index("tile") * STEP, STEP)
    steps = x_TD.shape[1] // STEP
    expert, is_used, is_shared = _entry(busy_N, index, routed)

    @pl.when(is_used & (warpgroup == 0))
    def _compute():
        ring.open()
        both = products(ring, steps, 2)
        chosen = _chose(expert_m, expert, is_shared, both[0])
        one = lax.broadcast_in_dim(jnp.where(is_shared, 1.0, 0.0), (WARPGROUP,), [])
        weight = jnp.where(one > 0, 1.0, _load_rows(weight_m))
        gate, up = (y * along_rows(weight, y) for y in both)
        out_mn[...] = jnp.where(chosen, jax.nn.silu(gate) * up, 0.0).astype(out_mn.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mn, out_NCF.at[index, tokens, outputs])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(is_used & (warpgroup == 1))
    def _move():
        def fill(matrices):
            @pl.loop(0, steps)
            def _(step):
                k = pl.ds(step * STEP, STEP)
                ring.fill(step, x_TD.at[tokens, k], *(w(k, outputs) for w in matrices))

        _with_matrices(fill, routed, shared, expert, is_shared)
        ring.drain(steps)


def experts_down(
    hidden: Float[Array, "N C F"],
    routed: Any,
    shared: Any,
    expert: Int[Array, "T_or_more"],
    busy: Int[Array, "N_or_more"],
    *,
    interpret=None,
) -> Float[Array, "C D"]:
    """The sum, in float32, of hidden @ down over each token's routed expert and the shared one.

    Args:
        hidden: from `experts_gate_up`.
        routed: down of the routed experts, [E, F, D]; None for a dense layer.
        shared: down of the shared expert, [F, D].
        expert: the expert of each token, as of `busy_experts`; what follows is of no token.
        busy: from `busy_experts`.
        interpret: parameters of an interpreter, or None.
    """
    if why_not_tpu(interpret) is None:
        known = Known(expert, jnp.ones(expert.shape, jnp.float32), busy[-1:])
        return down_tpu(hidden, routed, shared, known, interpret=interpret)
    (N, C, _), D = hidden.shape, shared.shape[1]
    kernel = hopper_kernel(
        functools.partial(_down_kernel, N),
        out_type=jax.ShapeDtypeStruct((C, D), jnp.float32),
        scratch_types=(
            Ring.types((tile(SLOTS, WARPGROUP, STEP), tile(SLOTS, STEP, STEP)), 1),
            plgpu.SMEM((WARPGROUP, STEP), jnp.float32),
        ),
        grid=(D // STEP,),
        grid_names=("tile",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="experts_down",
    )
    (expert_m,) = _pad_to_64(expert)
    return kernel(hidden, () if routed is None else (routed,), (shared,), expert_m, busy)


def _down_kernel(num_busy, hidden_NCF, routed, shared, expert_m, busy_N, out_CD, ring, out_mn):
    ring, warpgroup = Ring(*ring), lax.axis_index("warpgroup")
    tokens, outputs = tokens_tile("tile"), pl.ds(lax.axis_index("tile") * STEP, STEP)
    steps_per_expert = hidden_NCF.shape[2] // STEP

    @pl.when(warpgroup == 0)
    def _compute():
        ring.open()

        def add(index, state):
            begin, total = state
            expert, is_used, is_shared = _entry(busy_N, index, routed)
            steps = jnp.where(is_used, steps_per_expert, 0)
            (part,) = products(ring, steps, 1, begin)
            chosen = _chose(expert_m, expert, is_shared, part)
            return begin + steps, total + jnp.where(chosen, part, 0.0)

        zeros = full((WARPGROUP, STEP), 0.0, WGMMA)
        _, out_mn[...] = lax.fori_loop(0, num_busy, add, (jnp.int32(0), zeros))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mn, out_CD.at[tokens, outputs])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == 1)
    def _move():
        def fill_expert(index, begin):
            expert, is_used, is_shared = _entry(busy_N, index, routed)
            steps = jnp.where(is_used, steps_per_expert, 0)

            def fill(matrices):
                @pl.loop(0, steps)
                def _(step):
                    k = pl.ds(step * STEP, STEP)
                    hidden = hidden_NCF.at[index, tokens, k]
                    ring.fill(begin + step, hidden, *(w(k, outputs) for w in matrices))

            _with_matrices(fill, routed, shared, expert, is_shared)
            return begin + steps

        ring.drain(lax.fori_loop(0, num_busy, fill_expert, jnp.int32(0)))


def _pad_to_64(expert, router_weight=None) -> list[jax.Array]:
    """Pads the tokens' experts to 64 with -1, and their router weights, if given, with 0."""
    arrays = [pad_axis(expert.astype(jnp.int32) + 1, 0, WARPGROUP) - 1]
    if router_weight is None:
        return arrays
    return [*arrays, pad_axis(router_weight.astype(jnp.float32), 0, WARPGROUP)]


def _entry(busy_N, index, routed):
    """An entry of `busy_experts`: its expert, whether it is used, whether it is the shared one."""
    expert, is_shared = busy_N[index], index == busy_N.shape[0] - 1
    most = routed[0].shape[0] if routed else 1
    return expert, expert < most, is_shared


def _load_rows(ref) -> jax.Array:
    """Loads a vector into registers in the layout of an accumulator's rows."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def _chose(expert_m, expert, is_shared, like) -> jax.Array:
    """A mask of the shape of `like`: true in the rows of tokens that the expert serves.

    The shared expert serves all. Its range of expert numbers is everything, that of a routed expert
    is its own number, so that both masks are computed by the same two vector comparisons.
    """
    most = lax.broadcast_in_dim(jnp.where(is_shared, 2**30, expert), (WARPGROUP,), [])
    least = lax.broadcast_in_dim(jnp.where(is_shared, -(2**30), expert), (WARPGROUP,), [])
    mine = along_rows(_load_rows(expert_m), like)
    return (mine <= along_rows(most, like)) & (mine >= along_rows(least, like))


def _with_matrices(fill, routed, shared, expert, is_shared) -> None:
    """Calls `fill` with the expert's matrices, each a function (inputs, outputs) -> tile."""
    if routed:
        pl.when(~is_shared)(lambda: fill([lambda k, n, w=w: w.at[expert, k, n] for w in routed]))
    pl.when(is_shared)(lambda: fill([lambda k, n, w=w: w.at[k, n] for w in shared]))
