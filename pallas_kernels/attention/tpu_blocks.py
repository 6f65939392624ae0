"""Copies the blocks of pages that a core of a TPU visits, ahead of their use.

Shape letters are those of `decode_tpu`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_plan import Entries, Visits
from pallas_kernels.tpu import LANES

At = tuple[jax.Array, jax.Array]  # a visitor, which is a row or a tile of queries, and a block


def whole_row(visitor):
    """The row and the key heads that a visitor reads where it is a row."""
    return visitor, slice(None)


def scratch(streams: Sequence[Any], pages: int, slots: int, *, one_head: bool = False) -> list:
    """The memory that `Blocks` copies into.

    Args:
        streams: as for `Blocks`.
        pages: of a block.
        slots: blocks in flight; a power of two.
        one_head: whether a visitor reads keys and values of one key head.
    """

    def of_page(x):
        return x.shape[2:] if one_head and x.ndim == 4 else x.shape[1:]

    return [
        pltpu.SMEM((2 * slots, 1, LANES), jnp.int32),
        pltpu.SemaphoreType.DMA((2 * slots,)),
        [pltpu.VMEM((slots, pages, *of_page(x)), x.dtype) for x in streams],
        pltpu.SemaphoreType.DMA((slots,)),
    ]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Copies the blocks that a core visits, in order, each into one of some slots.

    The core's blocks are counted, and a block's `number` is its place among them.
    """

    visits: Visits
    count: Any  # of the core's blocks
    list: Any  # of `Entries`, in HBM
    streams: Sequence[Any]  # in HBM: keys, values, their scales, and last the coordinates
    entry: Any  # this and the following are `scratch`
    entry_copied: Any
    buffers: Sequence[Any]
    copied: Any
    reads: Callable = whole_row  # the row and the key heads that a visitor reads

    @property
    def pages(self) -> int:
        """How many pages a block has."""
        return self.buffers[0].shape[1]

    @property
    def entries(self) -> Entries:
        """The list, to name what an entry says."""
        return Entries(self.list, self.pages)

    @property
    def slots(self) -> int:
        """How many blocks there is room for."""
        return self.copied.shape[0]

    @property
    def listed(self) -> int:
        """How many entries of the list there is room for."""
        return self.entry_copied.shape[0]

    def prime(self, at: At) -> None:
        """Starts the copies of the core's first blocks, of which the first is at `at`."""
        for act, many in ((self._read_entry, self.listed), (self._load, self.slots)):
            ahead = at
            for number in range(many - 1):
                self._if_any(act, number, ahead)
                ahead = self._after(ahead)

    def visit(self, number, at: At, many, attend: Callable) -> None:
        """Calls `attend(number, at)` for some blocks, once each is there, and copies others ahead.

        Args:
            number: that of the first block.
            at: where it is.
            many: how many.
            attend: uses the block in the slot of a number.
        """

        def step(n, state):
            next_entry, next_block, at = state
            self._if_any(self._read_entry, n + self.listed - 1, next_entry)
            self._if_any(self._load, n + self.slots - 1, next_block)
            self._copies(n, at, lambda copy: copy.wait())
            attend(n, at)
            return tuple(map(self._after, state))

        ahead = self._after(at, self.listed - 1), self._after(at, self.slots - 1)
        lax.fori_loop(number, number + many, step, (*ahead, at))

    def _if_any(self, act: Callable, number, at: At) -> None:
        pl.when(number < self.count)(lambda: act(number, at))

    def _after(self, at: At, many: int = 1) -> At:
        """The block that follows, or a later one."""
        for _ in range(many):
            visitor, block = at
            ends = block + 1 >= self.visits.stop[visitor]
            visitor = jnp.where(ends, self.visits.following[visitor], visitor)
            at = visitor, jnp.where(ends, self.visits.start[visitor], block + 1)
        return at

    def masked(self, at: At) -> jax.Array:
        """Whether some query does not see some key of a block."""
        visitor, block = at
        visits = self.visits
        return (block < visits.full_start[visitor]) | (block >= visits.full_stop[visitor])

    def block(self, number) -> list:
        """References to what was copied of a block, in the order of the streams."""
        return [buffer.at[number & (self.slots - 1)] for buffer in self.buffers]

    def _entry_copy(self, number, at: At):
        row, _ = self.reads(at[0])
        slot = number & (self.listed - 1)
        source = self.list.at[row, at[1]]
        return pltpu.make_async_copy(source, self.entry.at[slot], self.entry_copied.at[slot])

    def _read_entry(self, number, at: At) -> None:
        self._entry_copy(number, at).start()

    def of_entry(self, number, index):
        """A number of a block's entry; see `Entries`."""
        return self.entry[number & (self.listed - 1), 0, index]

    def _load(self, number, at: At) -> None:
        self._entry_copy(number, at).wait()
        self._copies(number, at, lambda copy: copy.start())

    def _copies(self, number, at: At, act: Callable) -> None:
        _, heads = self.reads(at[0])
        self._stream_copies(number, heads, slice(None, -2), act)

        @pl.when(self.masked(at))
        def _():
            self._stream_copies(number, heads, slice(-2, None), act)

    def _stream_copies(self, number, heads, which: slice, act: Callable) -> None:
        slot = number & (self.slots - 1)
        entries = self.entries

        def copy(first, count, to):
            for source, goes in zip(self.streams[which], self.buffers[which], strict=True):
                pages = pl.ds(first, count)
                # All heads' scales are copied: those of one are no whole tile of memory.
                source = source.at[pages, heads] if len(source.shape) == 4 else source.at[pages]
                goes = goes.at[slot, pl.ds(to, count)]
                act(pltpu.make_async_copy(source, goes, self.copied.at[slot]))

        together = self.of_entry(number, entries.together) != 0

        @pl.when(together)
        def _():
            copy(self.of_entry(number, 0), self.pages, 0)

        @pl.when(~together)
        def _():
            @pl.loop(0, self.of_entry(number, entries.filled))
            def _(page):
                copy(self.of_entry(number, page), 1, page)
