"""A mixture of experts for few tokens: every busy expert, and the shared one, on all of them.

Multiplying by a matrix takes as long for 64 tokens as for one, so tokens are neither sorted nor
moved: a slot is one busy expert, and what it makes of tokens that did not choose it is left out.

Shape letters: T tokens, C of these rounded up to 8, D embed, F feed-forward width, E experts here,
N slots, the last of which is the shared expert's; m the 64 rows of a tile, n a tile of 64 outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import pad_axis
from pallas_kernels.mosaic import (
    COMPILER_PARAMS,
    ROWS,
    WARPGROUP,
    WGMMA,
    Ring,
    along_rows,
    full,
    tile,
)
from pallas_kernels.step.matmul import SLOTS, STEP, UNIT, pad_tokens, products, tokens_tile

GATED_SLOTS = 6  # steps in flight of two matrices


def slots_of(
    expert: Int[Array, "T"], num_experts: int, shared: Int[Array, ""] | bool = True
) -> Int[Array, "N"]:
    """The expert of each slot; `num_experts` for a slot without work. Not a sort.

    A slot is an expert, or where tokens are fewer than experts the first token that chose it.

    Args:
        expert: each token's; none here if it is negative or too large.
        shared: whether the shared expert, whose slot is the last, is computed here.
    """
    here = (expert >= 0) & (expert < num_experts)
    if len(expert) < num_experts:
        index = jnp.arange(len(expert))
        seen = jnp.any((expert[None] == expert[:, None]) & (index[None] < index[:, None]), axis=1)
        slots = jnp.where(here & ~seen, expert, num_experts)
    else:
        every = jnp.arange(num_experts)
        slots = jnp.where(jnp.any(expert[None] == every[:, None], axis=1), every, num_experts)
    last = jnp.where(shared, 0, num_experts)
    return jnp.append(slots, last).astype(jnp.int32)


def experts_gate_up(
    x: Float[Array, "T D"],
    routed: tuple[Float[Array, "E D F"], Float[Array, "E D F"]] | None,
    shared: tuple[Float[Array, "D F"], Float[Array, "D F"]],
    expert: Int[Array, "T"],
    score: Float[Array, "T"],
    slots: Int[Array, "N"],
    *,
    interpret=None,
) -> Float[Array, "N C F"]:
    """silu(s * x @ gate) * (s * x @ up) of each slot's expert; 0 for tokens that chose another.

    Args:
        routed, shared: gate and up; None for a layer without experts, which is one shared expert.
        score: s of each token's expert; that of the shared expert is 1.
        slots: from `slots_of`.
    """
    C, F = -(-x.shape[0] // UNIT) * UNIT, shared[0].shape[1]
    matrix = tile(GATED_SLOTS, STEP, STEP)
    kernel = plgpu.kernel(
        _gate_up_kernel,
        out_type=jax.ShapeDtypeStruct((slots.shape[0], C, F), x.dtype),
        scratch_types=(
            Ring.types((tile(GATED_SLOTS, WARPGROUP, STEP), matrix, matrix), 1),
            tile(WARPGROUP, STEP),
        ),
        grid=(slots.shape[0], F // STEP),
        grid_names=("slot", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="experts_gate_up",
    )
    of_token = _of_64_tokens(expert, score)
    return kernel(pad_tokens(x), routed or (), shared, *of_token, slots)


def _gate_up_kernel(x_TD, routed, shared, expert_m, score_m, slots_N, out_NCF, ring, out_mn):
    slot, warpgroup = lax.axis_index("slot"), lax.axis_index("warpgroup")
    ring, tokens = Ring(*ring), tokens_tile("tile")
    there = pl.ds(lax.axis_index("tile") * STEP, STEP)
    steps = x_TD.shape[1] // STEP
    expert, busy, is_shared = _slot(slots_N, slot, routed)

    @pl.when(busy & (warpgroup == 0))
    def _compute():
        ring.open()
        both = products(ring, steps, 2)
        chosen = _chose(expert_m, expert, is_shared, both[0])
        one = lax.broadcast_in_dim(jnp.where(is_shared, 1.0, 0.0), (WARPGROUP,), [])
        score = jnp.where(one > 0, 1.0, _of_rows(score_m))
        gate, up = (y * along_rows(score, y) for y in both)
        out_mn[...] = jnp.where(chosen, jax.nn.silu(gate) * up, 0.0).astype(out_mn.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mn, out_NCF.at[slot, tokens, there])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(busy & (warpgroup == 1))
    def _move():
        def fill(matrices):
            @pl.loop(0, steps)
            def _(step):
                k = pl.ds(step * STEP, STEP)
                ring.fill(step, x_TD.at[tokens, k], *(w(k, there) for w in matrices))

        _of_slot(fill, routed, shared, expert, is_shared)
        ring.drain(steps)


def experts_down(
    hidden: Float[Array, "N C F"],
    routed: Float[Array, "E F D"] | None,
    shared: Float[Array, "F D"],
    expert: Int[Array, "T"],
    slots: Int[Array, "N"],
    *,
    interpret=None,
) -> Float[Array, "C D"]:
    """The sum over slots of hidden @ down, float32: each token's expert and the shared one."""
    (N, C, _), D = hidden.shape, shared.shape[1]
    kernel = plgpu.kernel(
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
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="experts_down",
    )
    (expert_m,) = _of_64_tokens(expert)
    return kernel(hidden, () if routed is None else (routed,), (shared,), expert_m, slots)


def _down_kernel(num_slots, hidden_NCF, routed, shared, expert_m, slots_N, out_CD, ring, out_mn):
    ring, warpgroup = Ring(*ring), lax.axis_index("warpgroup")
    tokens, there = tokens_tile("tile"), pl.ds(lax.axis_index("tile") * STEP, STEP)
    steps_a_slot = hidden_NCF.shape[2] // STEP

    @pl.when(warpgroup == 0)
    def _compute():
        ring.open()

        def add(slot, state):
            begin, total = state
            expert, busy, is_shared = _slot(slots_N, slot, routed)
            steps = jnp.where(busy, steps_a_slot, 0)
            (part,) = products(ring, steps, 1, begin)
            chosen = _chose(expert_m, expert, is_shared, part)
            return begin + steps, total + jnp.where(chosen, part, 0.0)

        zeros = full((WARPGROUP, STEP), 0.0, WGMMA)
        _, out_mn[...] = lax.fori_loop(0, num_slots, add, (jnp.int32(0), zeros))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mn, out_CD.at[tokens, there])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == 1)
    def _move():
        def fill_slot(slot, begin):
            expert, busy, is_shared = _slot(slots_N, slot, routed)
            steps = jnp.where(busy, steps_a_slot, 0)

            def fill(matrices):
                @pl.loop(0, steps)
                def _(step):
                    k = pl.ds(step * STEP, STEP)
                    hidden = hidden_NCF.at[slot, tokens, k]
                    ring.fill(begin + step, hidden, *(w(k, there) for w in matrices))

            _of_slot(fill, routed, shared, expert, is_shared)
            return begin + steps

        ring.drain(lax.fori_loop(0, num_slots, fill_slot, jnp.int32(0)))


def _of_64_tokens(expert, score=None) -> list[jax.Array]:
    """Each token's expert, -1 for what is no token, and its score, as kernels read them."""
    arrays = [pad_axis(expert.astype(jnp.int32) + 1, 0, WARPGROUP) - 1]
    return arrays if score is None else [*arrays, pad_axis(score.astype(jnp.float32), 0, WARPGROUP)]


def _slot(slots_N, slot, routed):
    """A slot's expert, whether there is work, and whether it is the shared one's."""
    expert, is_shared = slots_N[slot], slot == slots_N.shape[0] - 1
    most = routed[0].shape[0] if routed else 1
    return expert, expert < most, is_shared


def _of_rows(ref) -> jax.Array:
    return plgpu.load(ref, layout=ROWS, optimized=False)


def _chose(expert_m, expert, is_shared, like) -> jax.Array:
    """Which rows a slot's expert serves."""
    # Masks come from vectors: every number is in the shared expert's range, its own in another's.
    most = lax.broadcast_in_dim(jnp.where(is_shared, 2**30, expert), (WARPGROUP,), [])
    least = lax.broadcast_in_dim(jnp.where(is_shared, -(2**30), expert), (WARPGROUP,), [])
    mine = along_rows(_of_rows(expert_m), like)
    return (mine <= along_rows(most, like)) & (mine >= along_rows(least, like))


def _of_slot(fill, routed, shared, expert, is_shared) -> None:
    """Calls `fill` with the matrices of a slot, each a function of its two slices."""
    if routed:
        pl.when(~is_shared)(lambda: fill([lambda k, n, w=w: w.at[expert, k, n] for w in routed]))
    pl.when(is_shared)(lambda: fill([lambda k, n, w=w: w.at[k, n] for w in shared]))
