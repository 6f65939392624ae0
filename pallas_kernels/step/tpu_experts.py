"""A mixture of experts for few tokens on TPUs: applies every busy expert to all tokens.

As `experts.py` on Hopper: an expert multiplies all tokens, and its results for tokens that did not
choose it are discarded.

Shape letters: T tokens, C of these rounded up to 8; D embed, F feed-forward width, E experts on
this device, N of these that can be busy, and the shared one; n a tile of outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.experts.tpu_products import multiply, static_for
from pallas_kernels.step.tpu_stream import (
    SLOTS,
    Matrix,
    Outbox,
    buffers,
    copy_tile,
    in_slot,
    is_matrix,
    pad_tokens,
    share_of_core,
    stream,
    tile_at,
    tile_width,
)
from pallas_kernels.tpu import IN_HBM, LANES, SUBLANES, VMEM_BYTES, in_hbm, num_cores

NO_EXPERT = 2**30 + 1  # listed where no token has chosen an expert
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES)


class Known(NamedTuple):
    """What the kernels know of the experts, in scalar memory.

    Attributes:
        expert: of each token; what follows is of no token.
        router_weight: of each token.
        shared: whether this device computes the shared expert: 0 if it does.
    """

    expert: Int[Array, "T_or_more"]
    router_weight: Float[Array, "T_or_more"]
    shared: Int[Array, "1"]


class _Work(NamedTuple):
    """Scratch that `_start` fills.

    Attributes:
        busy: the experts of this device that tokens chose, in the order of the tokens, then E if it
            computes the shared one; `NO_EXPERT` alone if there is none.
        seen: of each expert, whether it is listed.
        expert: of each token, along all lanes.
        router_weight: the same; 1 on the shared expert comes later.
    """

    busy: Any  # [N] in SMEM
    seen: Any  # [E] in SMEM
    expert: Any  # [C, LANES]
    router_weight: Any  # [C, LANES]

    @classmethod
    def types(cls, most: int, experts: int, tokens: int) -> "_Work":
        lanes = tokens, LANES
        return cls(
            pltpu.SMEM((most,), jnp.int32),
            pltpu.SMEM((max(1, experts),), jnp.int32),
            pltpu.VMEM(lanes, jnp.int32),
            pltpu.VMEM(lanes, jnp.float32),
        )


def gate_up_tpu(
    x: Float[Array, "T D"],
    routed: tuple[Matrix, Matrix] | None,
    shared: tuple[Matrix, Matrix],
    known: Known,
    *,
    interpret=None,
) -> Float[Array, "N C F"]:
    """As `experts_gate_up`, for experts in the order of `_Work.busy`; what follows is undefined."""
    E, F = _experts_here(routed), shared[0].shape[1]
    N = min(x.shape[0], E) + 1
    n, tokens = tile_width(shared, [F]), -(-x.shape[0] // SUBLANES) * SUBLANES
    n = max(LANES, n // 2) if F % max(LANES, n // 2) == 0 else n  # a step has two tiles
    matrices = routed, shared
    kernel = pl.pallas_call(
        functools.partial(_gate_up, static_for(shared[0], n), E, x.shape[0]),
        out_shape=jax.ShapeDtypeStruct((N, tokens, F), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(num_cores(),),
            in_specs=[
                pl.BlockSpec(x.shape, lambda core, *_: (0, 0)),
                jax.tree.map(lambda _: IN_HBM, matrices),
            ],
            out_specs=IN_HBM,
            scratch_shapes=[
                tuple(buffers(w, n) for w in shared),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                Outbox.types(tokens, n, x.dtype),
                _Work.types(N, E, tokens),
                pltpu.VMEM((tokens, x.shape[1]), x.dtype),
            ],
        ),
        compiler_params=PARAMS,
        interpret=interpret or False,
        name="experts_gate_up",
    )  # fmt: skip
    return kernel(*known, x, in_hbm(matrices))


def _gate_up(static, E, T, expert, router_weight, here, x_ref, matrices, out_ref, *scratch):
    ring, copied, outbox, work, padded_ref = scratch
    known, outbox = Known(expert, router_weight, here), Outbox(*outbox)
    pad_tokens(x_ref, padded_ref)
    used = _start(known, work, E, T)
    n, F = outbox.tiles.shape[-1], out_ref.shape[-1]
    begin, end = share_of_core(used * (F // n))

    def place(tile):
        return tile // (F // n), pl.ds(tile % (F // n) * n, n)

    def copies(tile, slot, act):
        entry, outputs = place(tile)
        _copy_expert(matrices, work.busy[entry], E, outputs, ring, slot, copied, act)

    def use(tile, slot):
        entry, outputs = place(tile)
        both = [multiply(static, padded_ref, in_slot(w, slot), 0) for w in ring]
        busy = work.busy[entry]
        weight = jnp.where(busy == E, 1.0, work.router_weight[:, :1])
        gate, up = (y * weight for y in both)
        hidden = jnp.where(_chose(work, busy, E), jax.nn.silu(gate) * up, 0.0)
        outbox.put(tile - begin, hidden, out_ref.at[entry, :, outputs])

    stream(begin, end, copies, use)
    outbox.close(end - begin, out_ref.at[0, :, pl.ds(0, n)])


def down_tpu(
    hidden: Float[Array, "N C F"],
    routed: Matrix | None,
    shared: Matrix,
    known: Known,
    *,
    interpret=None,
) -> Float[Array, "C D"]:
    """As `experts_down`."""
    (N, tokens, F), D, E = hidden.shape, shared.shape[1], _experts_here(routed)
    n = tile_width([shared], [D])
    matrices = routed, shared
    kernel = pl.pallas_call(
        functools.partial(_down, static_for(shared, n), E, min(tokens, len(known.expert))),
        out_shape=jax.ShapeDtypeStruct((tokens, D), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(num_cores(),),
            in_specs=[IN_HBM, jax.tree.map(lambda _: IN_HBM, matrices)],
            out_specs=IN_HBM,
            scratch_shapes=[
                buffers(shared, n),
                pltpu.VMEM((SLOTS, tokens, F), hidden.dtype),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                Outbox.types(tokens, n, jnp.float32),
                _Work.types(N, E, tokens),
                pltpu.VMEM((tokens, n), jnp.float32),
            ],
        ),
        compiler_params=PARAMS,
        interpret=interpret or False,
        name="experts_down",
    )
    return kernel(*known, hidden, in_hbm(matrices))


def _down(static, E, T, expert, router_weight, here, hidden_ref, matrices, out_ref, *scratch):
    ring, rows, copied, outbox, work, sum_ref = scratch
    known, outbox = Known(expert, router_weight, here), Outbox(*outbox)
    used = _start(known, work, E, T)
    n = sum_ref.shape[1]
    begin, end = share_of_core(out_ref.shape[1] // n)

    def copies(step, slot, act):
        entry, outputs = step % used, pl.ds(step // used * n, n)
        copy_tile(hidden_ref.at[entry], rows, slot, copied, act)
        _copy_expert(matrices, work.busy[entry], E, outputs, ring, slot, copied, act)

    def use(step, slot):
        tile, busy = step // used, work.busy[step % used]
        part = multiply(static, rows.at[slot], in_slot(ring, slot), 0)
        part = jnp.where(_chose(work, busy, E), part, 0.0)
        total = jnp.where(step % used == 0, 0.0, sum_ref[...]) + part
        sum_ref[...] = total

        @pl.when(step % used == used - 1)
        def _():
            outbox.put(tile - begin, total, out_ref.at[:, pl.ds(tile * n, n)])

    stream(begin * used, end * used, copies, use)
    outbox.close(end - begin, out_ref.at[:, pl.ds(0, n)])


def _experts_here(routed) -> int:
    """E; 0 in a dense layer."""
    return 0 if routed is None else jax.tree.leaves(routed)[0].shape[0]


def _start(known: Known, work: _Work, E: int, T: int) -> Any:
    """Fills the scratch; returns how many experts are listed, 1 or more."""
    work.expert[...] = jnp.full_like(work.expert, -1)
    work.router_weight[...] = jnp.zeros_like(work.router_weight)
    work.busy[0] = NO_EXPERT

    @pl.loop(0, E)
    def _(expert):
        work.seen[expert] = 0

    def list_expert(token, count):
        expert, row = known.expert[token], pl.ds(token, 1)
        work.expert[row] = jnp.full((1, LANES), expert, jnp.int32)
        work.router_weight[row] = jnp.full((1, LANES), known.router_weight[token], jnp.float32)
        is_here = (expert >= 0) & (expert < E)
        place = jnp.where(is_here, expert, 0)
        is_new = is_here & (work.seen[place] == 0)

        @pl.when(is_new)
        def _():
            work.busy[count] = expert
            work.seen[place] = 1

        return count + is_new.astype(jnp.int32)

    used = jax.lax.fori_loop(0, T, list_expert, jnp.int32(0))
    is_shared_here = known.shared[0] == 0

    @pl.when(is_shared_here)
    def _():
        work.busy[used] = E

    return jnp.maximum(used + is_shared_here.astype(jnp.int32), 1)


def _chose(work: _Work, busy, E: int) -> jax.Array:
    """Which tokens [C, 1] a listed expert serves: the shared one serves all."""
    mine = work.expert[:, :1]
    most = jnp.where(busy == E, jnp.int32(2**30), busy)
    least = jnp.where(busy == E, jnp.int32(-(2**30)), busy)
    return (mine <= most) & (mine >= least)


def _copy_expert(matrices, busy, E: int, outputs, ring, slot, copied, act) -> None:
    """Does `act` with the copies of a tile of a listed expert's matrices."""
    routed, shared = matrices

    def copy(kind, *outer):
        tiles = jax.tree.map(lambda w: tile_at(w, outputs, *outer), kind, is_leaf=is_matrix)
        copy_tile(tiles, ring, slot, copied, act)

    pl.when(busy >= E)(lambda: copy(shared))
    if routed is not None:
        pl.when(busy < E)(lambda: copy(routed, busy))
