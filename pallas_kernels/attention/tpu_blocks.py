"""Copies the blocks of pages that a core of a TPU visits, ahead of their use.

Shape letters are those of `decode_tpu`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_plan import Entries, Runs

At = tuple[jax.Array, jax.Array]  # a row, and a block of it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Copies the blocks of a core's run, in order, each into one of some slots."""

    runs: Runs
    list: Any  # of `Entries`, in HBM
    pages: int
    entry: Any  # [2 * slots, 1, LANES] in SMEM
    entry_copied: Any
    streams: Sequence[Any]  # in HBM: keys, values, their scales, and last the coordinates
    buffers: Sequence[Any]
    copied: Any

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

    def after(self, at: At) -> At:
        """The block that follows."""
        row, block = at
        ends = block + 1 >= self.runs.stop[row]
        row = jnp.where(ends, self.runs.following[row], row)
        return row, jnp.where(ends, self.runs.start[row], block + 1)

    def masked(self, at: At) -> jax.Array:
        """Whether some query does not see some key of a block."""
        row, block = at
        return (block < self.runs.full_start[row]) | (block >= self.runs.full_stop[row])

    def entry_copy(self, number, at: At):
        """The copy of a block's entry; `number` counts the blocks of the run."""
        of_row = self.list.shape[0] // self.runs.start.shape[0]
        slot = number & (self.listed - 1)
        source = self.list.at[at[0] * of_row + at[1]]
        return pltpu.make_async_copy(source, self.entry.at[slot], self.entry_copied.at[slot])

    def of_entry(self, number, index):
        """A number of a block's entry; see `Entries`."""
        return self.entry[number & (self.listed - 1), 0, index]

    def load(self, number, at: At) -> None:
        """Starts the copies of a block."""
        self.entry_copy(number, at).wait()
        self._copies(number, at, lambda copy: copy.start())

    def wait(self, number, at: At) -> None:
        """Waits until a block is there."""
        self._copies(number, at, lambda copy: copy.wait())

    def _copies(self, number, at: At, act: Callable) -> None:
        self._stream_copies(number, slice(None, -2), act)

        @pl.when(self.masked(at))
        def _():
            self._stream_copies(number, slice(-2, None), act)

    def _stream_copies(self, number, which: slice, act: Callable) -> None:
        slot = number & (self.slots - 1)
        entries = self.entries

        def copy(first, count, to):
            for source, goes in zip(self.streams[which], self.buffers[which], strict=True):
                source, goes = source.at[pl.ds(first, count)], goes.at[slot, pl.ds(to, count)]
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
