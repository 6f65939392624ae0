"""Inside a Hopper kernel: the order of blocks, and the mask of those that need one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.masks import BlockRanges, Coords, KeyRange
from pallas_kernels.mosaic import ROWS, WARPGROUP, Ring, along_rows


class BlockOrder:
    """First the blocks that need a mask, then the others; a softmax does not mind the order.

    The mask's registers are free again in the long second loop.
    """

    def __init__(self, ranges: BlockRanges):
        self.ranges = ranges
        self.before = ranges.full_start - ranges.start
        self.masked = self.before + ranges.stop - ranges.full_stop
        self.steps = ranges.stop - ranges.start

    @classmethod
    def load(cls, refs: BlockRanges, *index) -> "BlockOrder":
        """Reads one tile's ranges from arrays that hold those of all tiles."""
        return cls(BlockRanges(*(ref[index] for ref in refs)))

    def block(self, step: jax.Array | int) -> jax.Array:
        """The block of a step."""
        before, after = self.ranges.start + step, self.ranges.full_stop + step - self.before
        unmasked = self.ranges.full_start + step - self.masked
        return jnp.where(step < self.masked, jnp.where(step < self.before, before, after), unmasked)


def match_no_key(q: KeyRange) -> KeyRange:
    """Gives padding queries a segment that no key has, so that kernels compare segments only."""
    return q._replace(segment=jnp.where(q.segment == 0, -1, q.segment))


def load_tokens(ref, layout) -> jax.Array:
    """Loads one value a token into registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def eager(ref, layout) -> Any:
    """Loads one value a token now, and returns a thunk: for what a loop uses again and again."""
    value = load_tokens(ref, layout)
    return lambda: value


def lazy(ref, layout) -> Any:
    """A thunk that loads at each call: all of a block at once would fill the registers."""
    return lambda: load_tokens(ref, layout)


def apply_mask(x: jax.Array, fill: float, q: KeyRange, k: Coords, q_axis: int) -> jax.Array:
    """x, but `fill` where a query does not see the key.

    Args:
        q, k: holding thunks from `eager` or `lazy` in place of arrays.
        q_axis: the axis of x that queries lie along.
    """

    def along(value, axis):
        return lax.broadcast_in_dim(value(), x.shape, [axis])

    def key(value):
        return along(value, 1 - q_axis)

    def query(value):
        return along(value, q_axis)

    # A query's first position is not after its last, so `within` is one of the two, not both: an
    # `and` would become a second select for each score, an `xor` is part of the comparison.
    after = key(k.position) > query(q.last)
    within = (key(k.position) >= query(q.first)) ^ after
    return jnp.where(within & (key(k.segment) == query(q.segment)), x, fill)


def real_keys(segments: Any, begin: jax.Array) -> Callable:
    """A function for `CleanFill`: whether keys are real, from a row's slot `begin` on."""

    def real(start):
        return load_tokens(segments.at[pl.ds(begin + start, WARPGROUP)], ROWS) != 0

    return real


class CleanFill:
    """Fills steps of a ring of buffers with tokens, of which padding may hold NaN.

    Padding is multiplied by a probability of 0, and 0 times NaN is NaN. So the thread that
    copies a step puts zeros in their place before it hands the step on.
    """

    def __init__(self, ring: Ring, landed: Any, tiles: int):
        self.ring, self.landed, self.tiles = ring, landed, tiles

    @staticmethod
    def types(buffers: tuple) -> Any:
        """Scratch type of `landed`, a barrier for the copies of one step."""
        return plgpu.Barrier(num_arrivals=len(buffers))

    def fill(self, step: jax.Array, sources: tuple, clean: jax.Array, real: Callable) -> None:
        """Fills a step of the ring as `Ring.fill` does, with zeros for tokens that are not kept.

        Args:
            clean: whether nothing has to be replaced, which costs nothing.
            real: whether each of the WARPGROUP tokens from a given one on of the step is to be
                kept; called once they are there.
        """
        pl.when(clean)(lambda: self.ring.fill(step, *sources))
        pl.when(~clean)(lambda: self._fill(step, sources, real))

    def _fill(self, step: jax.Array, sources: tuple, real: Callable) -> None:
        slot = lax.rem(step, self.ring.slots)
        buffers = [buffer.at[slot] for buffer in self.ring.buffers]
        plgpu.barrier_wait(self.ring.released.at[slot])
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer, self.landed)
        plgpu.barrier_wait(self.landed)
        for buffer in buffers[: self.tiles]:
            self._clean(buffer, real)
        plgpu.commit_smem()
        for _ in buffers:
            plgpu.barrier_arrive(self.ring.filled.at[slot])

    def _clean(self, tile: Any, real: Callable) -> None:
        tokens, d = tile.shape
        for start in range(0, tokens, WARPGROUP):
            kept = real(start)
            for column in range(0, d, WARPGROUP):
                part = tile.at[pl.ds(start, WARPGROUP), pl.ds(column, WARPGROUP)]
                values = part[...]
                part[...] = jnp.where(along_rows(kept, values), values, jnp.bfloat16(0))
