"""Batches of packed documents: whole ones, each a segment of its row."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt8

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.features import vision_of
from jaxmoe.train.config import DataConfig
from jaxmoe.train.data import Batch, is_held_out
from jaxmoe.train.documents import Documents, Reading
from jaxmoe.train.packing import Order, Pieces, Rows, cut, pack_rows
from jaxmoe.train.pictures import PictureBatch, black_tiles, pixels_of, with_tiles
from jaxmoe.train.preferences import PreferenceBatch

AnyBatch = Batch | PictureBatch | PreferenceBatch


@dataclasses.dataclass(frozen=True)
class PackedData:
    """Documents in rows of `wanted.length` tokens.

    Attributes:
        documents: of every source of `wanted.mixture`, then those of `wanted.held_out`.
        wanted: how they are packed.
        model: the model's config, which says what pictures become.
        reading: how rows with pictures are read again.
        seed: of the packing and of the rows' order.
    """

    documents: Documents
    wanted: DataConfig
    model: Llama4Config
    reading: Reading
    seed: int

    def __post_init__(self):
        """Plans all rows.

        Raises:
            UserError: for documents that are too long, or if there is nothing to learn.
        """
        if self.wanted.too_long == "error":
            self._check_lengths()
        if not all(map(len, self._sources)):
            raise UserError(
                f"data has a source without anything to learn: of its {len(self.documents):,} "
                "documents none has a token that the loss counts, or all of them are left out."
            )
        if self.wanted.held_out_every and not len(self._held_out):
            raise UserError(
                f"held_out_every is {self.wanted.held_out_every}, but there are not as many "
                "documents with something to learn; hold out none, or give more."
            )

    @functools.cached_property
    def has_pictures(self) -> bool:
        """Whether some document has pictures."""
        return bool((self.documents.records["tiles"] > 0).any())

    @functools.cached_property
    def _tiles(self) -> int:
        """Tiles that a row has room for."""
        if self.wanted.tiles is not None or self.model.vision is None:
            return self.wanted.tiles or 1
        return max(self.wanted.length // self.model.vision.tokens_per_tile, 1)

    @functools.cached_property
    def _room(self) -> Int64[np.ndarray, "documents"]:
        """Tokens that each document takes of a row, more if it would take too many tiles.

        A document takes the larger of its shares of a row's tokens and tiles, so that rows with
        room for it in one number have room in both.
        """
        records = self.documents.records
        by_tiles = -(-records["tiles"].astype(np.int64) * self.wanted.length // self._tiles)
        return np.maximum(records["length"], by_tiles)

    @property
    def _side(self) -> int:
        return vision_of(self.model).image_size

    def _check_lengths(self) -> None:
        """Raises a UserError if a document has no room in a row."""
        too_long = np.flatnonzero(self._room > self.wanted.length)
        if not len(too_long):
            return
        worst = int(too_long[np.argmax(self._room[too_long])])
        record = self.documents.records[worst]
        tiles = f" and {record['tiles']} tiles" if record["tiles"] else ""
        raise UserError(
            f"{len(too_long):,} of {len(self.documents):,} documents are longer than data.length, "
            f"{self.wanted.length}: {self.documents.where(worst)} has {record['length']:,} tokens"
            f"{tiles}; raise 'length', or set 'too_long' to truncate, split or drop."
        )

    @functools.cached_property
    def _split(self) -> tuple[list[Int64[np.ndarray, "_"]], Int64[np.ndarray, "held_out"]]:
        """The documents that each source trains on, and those that are held out."""
        *sources, extra = map(np.array, self.documents.sources)
        held = [is_held_out(np.arange(len(x)), self.wanted.held_out_every) for x in sources]
        trained = [x[~h].astype(np.int64) for x, h in zip(sources, held, strict=True)]
        kept = [x[h] for x, h in zip(sources, held, strict=True)]
        return trained, np.concatenate([*kept, extra]).astype(np.int64)

    @functools.cached_property
    def _sources(self) -> list[Rows]:
        return [self._packed(chosen, i) for i, chosen in enumerate(self._split[0])]

    @functools.cached_property
    def _held_out(self) -> Rows:
        return self._packed(self._split[1], len(self._split[0]))

    def _packed(self, chosen: Int64[np.ndarray, "chosen"], number: int) -> Rows:
        """Rows of the chosen documents; those without a target are left out."""
        tiles = self.documents.records["tiles"][chosen]
        lengths = np.where(tiles > 0, self._room[chosen], self.documents.records["length"][chosen])
        divisible = (tiles == 0) & (self.documents.records["second"][chosen] == 0)
        pieces = cut(lengths, self.wanted.length, self.wanted.too_long, divisible)
        pieces = Pieces(chosen[pieces.document], pieces.start, pieces.stop)
        pieces = pieces[self._has_targets(pieces)]
        sizes = pieces.stop - pieces.start
        stop = np.minimum(pieces.stop, self.documents.records["length"][pieces.document])
        whole = Pieces(pieces.document, pieces.start, stop)
        return pack_rows(whole, sizes, self.wanted.length, (self.seed, 0, number))

    def _has_targets(self, pieces: Pieces) -> Bool[np.ndarray, "pieces"]:
        """Whether the loss counts any token of a piece but its first, which nothing predicts."""
        records, offsets = self.documents.records, self.documents.offsets
        found = records["targets"][pieces.document] > 0
        is_part = pieces.stop - pieces.start < records["length"][pieces.document]
        for i in np.flatnonzero(found & is_part):
            first = offsets[pieces.document[i]]
            place = slice(first + pieces.start[i] + 1, first + pieces.stop[i])
            found[i] = self.documents.learned[place].any()
        return found

    @functools.cached_property
    def _order(self) -> Order:
        weights = [weight for _, weight in self.wanted.mixture]
        return Order([len(rows) for rows in self._sources], weights, self.seed)

    @functools.cached_property
    def summary(self) -> str:
        """How many documents and rows there are, and how full these are."""
        documents = sum(len(np.unique(rows.pieces.document)) for rows in self._sources)
        rows = sum(map(len, self._sources))
        tokens = sum(int((x.pieces.stop - x.pieces.start).sum()) for x in self._sources)
        left_out = sum(map(len, self._split[0])) - documents
        parts = [
            f"{documents:,} documents in {rows:,} rows of {self.wanted.length:,} tokens",
            f"{tokens / (rows * self.wanted.length):.1%} full",
            f"{len(self._split[1]):,} held out" if len(self._split[1]) else "",
            f"{left_out:,} too long or with nothing to learn" if left_out else "",
            f"{self.documents.skipped:,} skipped" if self.documents.skipped else "",
        ]
        return ", ".join(filter(None, parts))

    @functools.cached_property
    def _pairs(self) -> int:
        """The most documents that a row has, if they are pairs; else 0."""
        if not self.reading.pairs:
            return 0
        packed = [*self._sources, self._held_out]
        return max(int(np.diff(rows.offsets).max(initial=0)) for rows in packed)

    def batch(self, step: int) -> AnyBatch:
        """The rows of a step, counted from 0: a function of the seed and the step alone."""
        size = self.wanted.batch_size
        places = map(self._order.at, range(step * size, (step + 1) * size))
        return self._batch([self._sources[source][row] for source, row in places])

    def held_out(self) -> Iterator[AnyBatch]:
        """All held-out rows once; what the last batch lacks is padding."""
        return self._in_batches([self._held_out])

    def everything(self) -> Iterator[AnyBatch]:
        """All rows once, those that are held out last; what the last batch lacks is padding."""
        return self._in_batches([*self._sources, self._held_out])

    def _in_batches(self, packed: list[Rows]) -> Iterator[AnyBatch]:
        size, empty = self.wanted.batch_size, self._held_out.pieces[:0]
        rows = (part[i] for part in packed for i in range(len(part)))
        for some in itertools.batched(rows, size):
            yield self._batch([*some, *[empty] * (size - len(some))])

    def _tokens(
        self, pieces: Pieces, index: int
    ) -> tuple[Int[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
        first = self.documents.offsets[pieces.document[index]]
        place = slice(first + pieces.start[index], first + pieces.stop[index])
        return self.documents.tokens[place].astype(np.int32), self.documents.learned[place]

    def _batch(self, rows: list[Pieces]) -> AnyBatch:
        shape = len(rows), self.wanted.length
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        learned, pixels, shown = np.zeros(shape, bool), None, 0
        if self.has_pictures:
            pixels = black_tiles(len(rows) * self._tiles, self._side)
        for row, pieces in enumerate(rows):
            used = 0
            for index in range(len(pieces)):
                own, counts = self._tokens(pieces, index)
                if pixels is not None and len(tiles := self._pixels(pieces, index)):
                    end = shown + len(tiles)
                    pixels[shown:end], own = tiles, with_tiles(self.model, own, shown, end)
                    shown = end
                place = row, slice(used, used + len(own))
                tokens[place], learned[place] = own, counts
                segment_ids[place] = self._segments(pieces, index)
                used += len(own)
        batch = tokens, segment_ids, learned
        if self._pairs:
            documents = self._documents_of(rows)
            source = self._source_of(documents) if self.wanted.source_names else None
            return PreferenceBatch(*batch, documents, source=source, pixels=pixels)
        source = self._source_of_tokens(rows)
        return Batch(*batch, source) if pixels is None else PictureBatch(*batch, pixels, source)

    def _documents_of(self, rows: list[Pieces]) -> Int32[np.ndarray, "rows pairs"]:
        """The number of each pair of some rows; -1 for none."""
        documents = np.full((len(rows), self._pairs), -1, np.int32)
        for row, pieces in enumerate(rows):
            documents[row, : len(pieces)] = pieces.document
        return documents

    def _source_of(self, documents: Int[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """The number of the source that documents are of; that of `held_out` comes last."""
        ends = [found.stop for found in self.documents.sources]
        return np.searchsorted(ends, documents, side="right").astype(np.int32)

    def _source_of_tokens(self, rows: list[Pieces]) -> Int32[np.ndarray, "rows length"] | None:
        """The source of each token of some rows, of padding any; None if there is only one."""
        if not self.wanted.source_names:
            return None
        found = np.zeros((len(rows), self.wanted.length), np.int32)
        for row, pieces in enumerate(rows):
            of_tokens = np.repeat(self._source_of(pieces.document), pieces.stop - pieces.start)
            found[row, : len(of_tokens)] = of_tokens
        return found

    def _segments(self, pieces: Pieces, index: int) -> int | Int[np.ndarray, "tokens"]:
        """The segment of each token of a piece of a row; an answer of a pair is one of its own."""
        if not self._pairs:
            return index + 1
        document = pieces.document[index]
        length, second = (int(self.documents.records[x][document]) for x in ("length", "second"))
        return 2 * index + 1 + (np.arange(length) >= second).astype(np.int32)

    def _pixels(self, pieces: Pieces, index: int) -> UInt8[np.ndarray, "tiles side side 3"]:
        """The tiles of a document's pictures, which are read again; none if it has none."""
        document = int(pieces.document[index])
        if not self.documents.records["tiles"][document]:
            return black_tiles(0, self._side)
        row, length = self.documents.row(document), self.documents.records["length"][document]
        read = self.reading
        rendered = read.render_pair(row)[0] if read.pairs else read.render(row)
        if len(rendered.learned) != length:
            raise UserError(f"{self.documents.where(document)} has a picture of another size now.")
        return pixels_of(rendered, self._side)
