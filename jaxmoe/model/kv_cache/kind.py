"""What a kind of cache is: its pages, which tokens it keeps, and how new tokens attend to it."""

import abc
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from jaxmoe.model.kernels import AttentionOptions
from jaxmoe.model.kv_cache.layer import LayerCache, PieceTable
from jaxmoe.model.kv_cache.pages import Pool
from jaxmoe.model.sequence import NewTokens
from pallas_kernels.attention import Coords


class Room(NamedTuple):
    """What a cache is to hold.

    Attributes:
        rows: of a group of rows.
        groups: of rows, each with pages of its own.
        shards: devices that share a row, where a kind is sharded.
        capacity: tokens that a row can hold.
        tokens: that all rows of a group together can hold; None: the capacity of each.
        ring_tokens: the same of rings; None: what `tokens` tokens need.
    """

    rows: int
    groups: int
    shards: int
    capacity: int
    tokens: int | None
    ring_tokens: int | None = None


class PoolSize(NamedTuple):
    """The sizes of a pool.

    Attributes:
        columns: pages of a row at most, in each store.
        pages: of each store, the null page included.
        page: tokens of a page.
        stores: how many devices or groups of devices have pages of their own.
        shards: stores that share a row.
    """

    columns: int
    pages: int
    page: int
    stores: int
    shards: int


class CacheStep(NamedTuple):
    """What layers with one kind of cache share in a call.

    Attributes:
        index: the slot in a device's pages that each new token goes to; beyond them for none.
        pool: the pool after the call.
        before: coordinates of the pool's slots before the call; None where the new tokens of a row
            are of one chunk, so that none of them sees what they overwrite.
        table: the pages of each line of new tokens; of packed tokens those of all rows.
        pieces: of packed tokens, the pages of the rows that have a piece; else None.
    """

    index: Int[Array, "shards B S"]
    pool: Pool
    before: Coords | None
    table: Int[Array, "shards L n"]
    pieces: PieceTable | None = None


class CacheKind(abc.ABC):
    """A kind of cache, whose layers share one pool. Kinds that are equal are one."""

    @property
    @abc.abstractmethod
    def page(self) -> int:
        """Tokens of a page."""

    @property
    @abc.abstractmethod
    def sharded(self) -> bool:
        """Whether the devices of the `slots` axis share each row's pages."""

    @property
    @abc.abstractmethod
    def shares(self) -> bool:
        """Whether rows that begin alike may share whole pages: nothing is written to them again."""

    @abc.abstractmethod
    def pages_for(self, tokens: int, shards: int) -> int:
        """Pages that a row of so many tokens takes at most, of each of the `shards` devices."""

    @abc.abstractmethod
    def size(self, room: Room) -> PoolSize:
        """How large its pool is."""

    @abc.abstractmethod
    def slots(
        self,
        new: Coords,
        last: Coords,
        order: Int[Array, "B S"],
        dealt: Int[Array, "B S"],
        shards: int,
    ) -> Int[Array, "B S"]:
        """The slot of each new token in its row's pages on this device; -1 for one that has none.

        Args:
            new: coordinates of the new tokens.
            last: those of the last new token of each one's row.
            order: how many tokens their row had before each; -1 for padding.
            dealt: the device that has the first page of each one's row.
            shards: devices that share a row.
        """

    @abc.abstractmethod
    def attend(
        self,
        options: AttentionOptions,
        axes: tuple[str, ...],
        q: Float[Array, "B H S d"],
        k: Float[Array, "B K S d"],
        v: Float[Array, "B K S d"],
        tokens: NewTokens,
        cache: LayerCache,
        step: CacheStep,
    ) -> tuple[Any, LayerCache]:
        """Writes the new tokens and attends to all that they see, on each device.

        Args:
            axes: the mesh axes that new tokens are sharded over.
            q, k, v: of this device's new tokens.

        Returns:
            The output [B, H, S, d] for this device's new tokens, and the cache with them.
        """
