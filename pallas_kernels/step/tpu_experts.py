"""A mixture of experts for few tokens on TPUs: applies every busy expert to all tokens.

As `experts.py` on Hopper: an expert multiplies all tokens, and its results for tokens that did not
choose it are discarded.

Shape letters: T tokens, C of these rounded up to 8; D embed, F feed-forward width, E experts on
this device, N busy experts with the shared one last; n a tile of outputs.
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

PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES)


class Busy(NamedTuple):
    """What the kernels know of the experts, in scalar memory."""

    expert: Int[Array, "T"]
    router_weight: Float[Array, "T"]
    busy: Int[Array, "N"]


class _Work(NamedTuple):
    """Scratch that `_start` fills.

    Attributes:
        entries: the entries of `busy` that are used, in order; the last entry if none is.
        expert: of each token, along all lanes.
        router_weight: the same; 1 on the shared expert comes later.
    """

    entries: Any  # [N] in SMEM
    expert: Any  # [C, LANES]
    router_weight: Any  # [C, LANES]

    @classmethod
    def types(cls, entries: int, tokens: int) -> "_Work":
        lanes = tokens, LANES
        return cls(
            pltpu.SMEM((entries,), jnp.int32),
            pltpu.VMEM(lanes, jnp.int32),
            pltpu.VMEM(lanes, jnp.float32),
        )


def gate_up_tpu(
    x: Float[Array, "T D"],
    routed: tuple[Matrix, Matrix] | None,
    shared: tuple[Matrix, Matrix],
    known: Busy,
    *,
    interpret=None,
) -> Float[Array, "N C F"]:
    """As `experts_gate_up`; what unused entries hold is undefined."""
    F, N = shared[0].shape[1], known.busy.shape[0]
    n, tokens = tile_width(shared, [F]), -(-x.shape[0] // SUBLANES) * SUBLANES
    n = max(LANES, n // 2) if F % max(LANES, n // 2) == 0 else n  # a step has two tiles
    matrices = routed, shared
    kernel = pl.pallas_call(
        functools.partial(_gate_up, static_for(shared[0], n), _experts_here(routed)),
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
                _Work.types(N, tokens),
                pltpu.VMEM((tokens, x.shape[1]), x.dtype),
            ],
        ),
        compiler_params=PARAMS,
        interpret=interpret or False,
        name="experts_gate_up",
    )  # fmt: skip
    return kernel(*known, x, in_hbm(matrices))


def _gate_up(static, experts, expert, router_weight, busy, x_ref, matrices, out_ref, *scratch):
    ring, copied, outbox, work, padded_ref = scratch
    known, outbox = Busy(expert, router_weight, busy), Outbox(*outbox)
    pad_tokens(x_ref, padded_ref)
    used = _start(known, work, experts)
    n, F = outbox.tiles.shape[-1], out_ref.shape[-1]
    begin, end = share_of_core(used * (F // n))

    def place(tile):
        return work.entries[tile // (F // n)], pl.ds(tile % (F // n) * n, n)

    def copies(tile, slot, act):
        entry, outputs = place(tile)
        _copy_expert(matrices, known, entry, outputs, ring, slot, copied, act)

    def use(tile, slot):
        entry, outputs = place(tile)
        both = [multiply(static, padded_ref, in_slot(w, slot), 0) for w in ring]
        is_shared = entry == known.busy.shape[0] - 1
        weight = jnp.where(is_shared, 1.0, work.router_weight[:, :1])
        gate, up = (y * weight for y in both)
        chose = _chose(known, work, entry, experts)
        hidden = jnp.where(chose, jax.nn.silu(gate) * up, 0.0)
        outbox.put(tile - begin, hidden, out_ref.at[entry, :, outputs])

    stream(begin, end, copies, use)
    outbox.close(end - begin, out_ref.at[0, :, pl.ds(0, n)])


def down_tpu(
    hidden: Float[Array, "N C F"],
    routed: Matrix | None,
    shared: Matrix,
    known: Busy,
    *,
    interpret=None,
) -> Float[Array, "C D"]:
    """As `experts_down`."""
    (N, tokens, F), D = hidden.shape, shared.shape[1]
    n = tile_width([shared], [D])
    matrices = routed, shared
    kernel = pl.pallas_call(
        functools.partial(_down, static_for(shared, n), _experts_here(routed)),
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
                _Work.types(N, tokens),
                pltpu.VMEM((tokens, n), jnp.float32),
            ],
        ),
        compiler_params=PARAMS,
        interpret=interpret or False,
        name="experts_down",
    )
    return kernel(*known, hidden, in_hbm(matrices))


def _down(static, experts, expert, router_weight, busy, hidden_ref, matrices, out_ref, *scratch):
    ring, rows, copied, outbox, work, sum_ref = scratch
    known, outbox = Busy(expert, router_weight, busy), Outbox(*outbox)
    used = _start(known, work, experts)
    n = sum_ref.shape[1]
    begin, end = share_of_core(out_ref.shape[1] // n)

    def copies(step, slot, act):
        entry, outputs = work.entries[step % used], pl.ds(step // used * n, n)
        copy_tile(hidden_ref.at[entry], rows, slot, copied, act)
        _copy_expert(matrices, known, entry, outputs, ring, slot, copied, act)

    def use(step, slot):
        tile, entry = step // used, work.entries[step % used]
        part = multiply(static, rows.at[slot], in_slot(ring, slot), 0)
        part = jnp.where(_chose(known, work, entry, experts), part, 0.0)
        total = jnp.where(step % used == 0, 0.0, sum_ref[...]) + part
        sum_ref[...] = total

        @pl.when(step % used == used - 1)
        def _():
            outbox.put(tile - begin, total, out_ref.at[:, pl.ds(tile * n, n)])

    stream(begin * used, end * used, copies, use)
    outbox.close(end - begin, out_ref.at[:, pl.ds(0, n)])


def _experts_here(routed) -> int:
    """E, or 1 in a dense layer, whose list of busy experts has only the shared one."""
    return 1 if routed is None else jax.tree.leaves(routed)[0].shape[0]


def _start(known: Busy, work: _Work, experts: int):
    """Fills the scratch; returns how many entries there are to go through, 1 or more."""
    last = known.busy.shape[0] - 1
    work.entries[0] = last

    def list_entry(entry, count):
        is_used = known.busy[entry] < experts

        @pl.when(is_used)
        def _():
            work.entries[count] = entry

        return count + is_used.astype(jnp.int32)

    used = jax.lax.fori_loop(0, last + 1, list_entry, jnp.int32(0))
    work.expert[...] = jnp.full_like(work.expert, -1)
    work.router_weight[...] = jnp.zeros_like(work.router_weight)

    @pl.loop(0, known.expert.shape[0])
    def _(token):
        row = pl.ds(token, 1)
        work.expert[row] = jnp.full((1, LANES), known.expert[token], jnp.int32)
        work.router_weight[row] = jnp.full((1, LANES), known.router_weight[token], jnp.float32)

    return jnp.maximum(used, 1)


def _chose(known: Busy, work: _Work, entry, experts: int) -> jax.Array:
    """Which tokens [C, 1] an entry serves: the shared expert all, an unused entry none."""
    expert, is_shared = known.busy[entry], entry == known.busy.shape[0] - 1
    mine = work.expert[:, :1]
    most = jnp.where(is_shared, jnp.int32(2**30), expert)
    least = jnp.where(is_shared, jnp.int32(-(2**30)), expert)
    least = jnp.where(expert < experts, least, jnp.int32(2**30 + 1))
    return (mine <= most) & (mine >= least)


def _copy_expert(matrices, known: Busy, entry, outputs, ring, slot, copied, act) -> None:
    """Does `act` with the copies of a tile of an entry's matrices; the last entry is shared."""
    routed, shared = matrices
    is_shared = entry == known.busy.shape[0] - 1

    def copy(kind, *outer):
        tiles = jax.tree.map(lambda w: tile_at(w, outputs, *outer), kind, is_leaf=is_matrix)
        copy_tile(tiles, ring, slot, copied, act)

    pl.when(is_shared)(lambda: copy(shared))
    if routed is not None:
        pl.when(~is_shared)(lambda: copy(routed, known.busy[entry]))
