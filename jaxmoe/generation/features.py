"""Features of images on the devices: which tiles' are there, and which token reads which.

In the tokens of a prompt the place of an image's feature has the image token. Inside the engine it
has a reference: `vocab_size + i`, where i counts the features of all images of a call, so that
prompts with the same images share prefixes and prompts with other images do not. In a step
it is `vocab_size + s`, where s is a row of the table of features that the step is given.

The table holds a fixed number of tiles. A tile is computed when a step first reads one of its
tokens, together with those that come after it, and gives way when other tiles need room, the one
that was read longest ago first.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt8

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config, vision_of
from jaxmoe.errors import UserError
from jaxmoe.images.picture import Picture
from jaxmoe.mesh import on_all_devices
from jaxmoe.model import vision
from jaxmoe.model.steps import Place, without_features

TILES = 128  # of a table; of Scout they take 188 MB in bfloat16
BATCHES = (16, 4, 1)  # tiles that are computed at once: few sizes, since each is compiled
LARGEST = 2**31 - 1  # of a token or reference
DECODED = 32  # pictures whose pixels are kept: a step has new tiles of so many, at most

Encode = Callable[[Llama4Config, dict, jax.Array], jax.Array]


class Tile(NamedTuple):
    """One tile of a picture, which is the same tile in every picture with the same digest."""

    digest: bytes
    index: int


class FeatureTable:
    """The features of the tiles that were read last.

    Attributes:
        params: the vision tower's parameters that the features are computed by.
        table: [tiles * tokens of a tile, D], on every device.
        computed: how many tiles have been computed.
        lost: why pictures could not be read again, by their digest; their features are those of
            black tiles.
    """

    def __init__(
        self,
        config: Llama4Config,
        params: dict,
        *,
        tiles: int = TILES,
        encode: Encode = vision.tile_features,
    ):
        """An empty table on the current mesh.

        Args:
            tiles: how many it holds; a step that reads more of them makes it larger.
            encode: `jaxmoe.model.vision.tile_features`, or a fork's function of the same arguments.

        Raises:
            UserError: if the model has no vision tower.
        """
        self._vision = vision_of(config)
        self._config, self._encode = config, encode
        self.params, self._dtype = params["vision"], params["embed"].dtype
        self._slots: collections.OrderedDict[Tile, int] = collections.OrderedDict()
        self._pixels = functools.lru_cache(DECODED)(lambda picture: picture.tiles())
        self.lost: dict[bytes, str] = {}
        self.computed = 0
        self._empty(tiles)

    def _empty(self, tiles: int) -> None:
        self._slots.clear()
        self._free: list[int] = []
        self._size = 0
        self.table: Float[Array, "N D"] | None = None
        self._grow(tiles)

    @property
    def tokens_per_tile(self) -> int:
        """Features of a tile."""
        return self._vision.tokens_per_tile

    def slots(self, tiles: Sequence[tuple[Picture, int]]) -> list[int]:
        """The places of tiles in the table, which are computed if they are not there.

        Args:
            tiles: pictures, and which of their tiles.
        """
        wanted = {Tile(picture.digest, i): (picture, i) for picture, i in tiles}
        self._grow(len(wanted))
        for tile in [tile for tile in self._slots if tile.digest in self.lost]:
            self._free.append(self._slots.pop(tile))  # they may be there again
        self.lost.clear()
        for tile in wanted.keys() & self._slots.keys():
            self._slots.move_to_end(tile)
        missing = [place for tile, place in wanted.items() if tile not in self._slots]
        if missing:
            self._compute(self._with_next(missing, len(wanted)))
        return [self._slots[Tile(picture.digest, i)] for picture, i in tiles]

    def _with_next(self, missing: list[tuple[Picture, int]], wanted: int):
        """Tiles that are missing, and those of their last picture that come next, to fill a batch.

        Args:
            wanted: tiles that a step reads, none of which may give way.
        """
        picture, last = missing[-1]
        coming = [(picture, i) for i in range(last + 1, picture.num_tiles)]
        coming = [(_, i) for _, i in coming if Tile(picture.digest, i) not in self._slots]
        return missing + coming[: min(self._size - wanted, -len(missing) % BATCHES[0])]

    def _compute(self, tiles: list[tuple[Picture, int]]) -> None:
        try:
            for part in batches(tiles):
                pixels = np.stack([self._pixels_of(picture, i) for picture, i in part])
                slots = np.array([self._place() for _ in part], np.int32)
                self.table = _write(
                    self._config, self._encode, self.params, pixels, self.table, slots
                )
                for (picture, i), slot in zip(part, slots.tolist(), strict=True):
                    self._slots[Tile(picture.digest, i)] = slot
                self.computed += len(part)
        except BaseException:  # the table was donated, and places are taken that nothing has
            self._empty(self._size)
            raise

    def _pixels_of(self, picture: Picture, i: int) -> np.ndarray:
        """The pixels of a tile; black if the picture cannot be read again, which `lost` says."""
        try:
            return self._pixels(picture)[i]
        except UserError as error:
            self.lost[picture.digest] = str(error)
            side = self._vision.image_size
            return np.zeros((side, side, self._vision.num_channels), np.uint8)

    def _place(self) -> int:
        """A free place, or that of the tile that was read longest ago."""
        return self._free.pop() if self._free else self._slots.popitem(last=False)[1]

    def _grow(self, tiles: int) -> None:
        """Makes room for so many tiles; those that are there stay."""
        if tiles <= self._size:
            return
        tiles = max(tiles, 2 * self._size)
        width, dtype = self._config.hidden_size, self._dtype
        rows = (tiles - self._size) * self.tokens_per_tile
        more = _zeros((rows, width), dtype)
        self.table = more if self.table is None else _joined(self.table, more)
        self._free = [*range(tiles - 1, self._size - 1, -1), *self._free]
        self._size = tiles


class References:
    """The tokens of a call's prompts, with a reference at each place of an image's feature."""

    def __init__(self, config: Llama4Config, table: FeatureTable, *, keeps_lost: bool = False):
        """No pictures yet.

        Args:
            keeps_lost: a picture that cannot be read again is black, which `lost` says; otherwise
                that is an error.
        """
        self._config, self._table, self._keeps_lost = config, table, keeps_lost
        self._tiles: dict[int, tuple[Picture, int]] = {}
        self._first: dict[bytes, int] = {}  # a picture's first tile, by its digest
        self._users: collections.Counter[bytes] = collections.Counter()  # prompts, by the same
        self._next, self._most = 0, (LARGEST - config.vocab_size) // table.tokens_per_tile
        self._lost: dict[bytes, str] = {}

    def of(
        self, what: str, tokens: Sequence[int] | np.ndarray, pictures: Sequence[Picture]
    ) -> np.ndarray:
        """The tokens with references to the pictures' features, in order.

        Args:
            what: whose tokens, for an error message.

        Raises:
            UserError: if the tokens have more or fewer places than the pictures have features.
        """
        found = np.array(tokens, np.int32)
        places = np.count_nonzero(found == self._config.image_token_id)
        numbers = [self._numbers(picture) for picture in pictures]
        count = sum(map(len, numbers))
        if places != count:
            raise UserError(
                f"{what} has {places} image tokens for {len(pictures)} images of {count} "
                "features; make its tokens of its images by a chat, or by the images' layout."
            )
        self._users.update(picture.digest for picture in pictures)
        return with_references(self._config, found, np.concatenate([[], *numbers]))

    def release(self, pictures: Sequence[Picture]) -> None:
        """Forgets the pictures of a prompt that is not read again, unless other prompts have them.

        The references of a picture that comes later are others.
        """
        for picture in pictures:
            self._users[picture.digest] -= 1
            if self._users[picture.digest]:
                continue
            del self._users[picture.digest]
            self._lost.pop(picture.digest, None)
            first = self._first.pop(picture.digest)
            for i in range(picture.num_tiles):
                del self._tiles[first + i]

    def _free(self, count: int) -> int:
        """The first of so many numbers of tiles that no picture has, after the last given ones."""
        first = self._next
        while first + count > self._most or any(first + i in self._tiles for i in range(count)):
            first = 0 if first + count > self._most else first + 1
        return first

    def _numbers(self, picture: Picture) -> np.ndarray:
        """The numbers of a picture's features."""
        if picture.digest not in self._first:
            first = self._first[picture.digest] = self._free(picture.num_tiles)
            self._tiles |= {first + i: (picture, i) for i in range(picture.num_tiles)}
            self._next = first + picture.num_tiles
        each = self._table.tokens_per_tile
        return self._first[picture.digest] * each + np.arange(picture.num_tiles * each)

    def place(
        self, tokens: Integer[np.ndarray, "*shape"]
    ) -> tuple[Integer[np.ndarray, "*shape"], Float[Array, "N D"] | None]:
        """The tokens of a step, whose references are rows of the table, and the table.

        Raises:
            UserError: if a picture cannot be read again, unless that is kept.
        """
        vocabulary, each = self._config.vocab_size, self._table.tokens_per_tile
        is_reference = tokens >= vocabulary
        if not is_reference.any():  # with the table all the same: each step is compiled once
            return tokens, self._table.table
        tile, feature = np.divmod(tokens[is_reference] - vocabulary, each)
        numbers, inverse = np.unique(tile, return_inverse=True)
        slots = np.array(self._table.slots([self._tiles[n] for n in numbers]), np.int32)
        self._lost |= self._table.lost
        if self._lost and not self._keeps_lost:
            raise UserError(next(iter(self._lost.values())))
        tokens = tokens.copy()
        tokens[is_reference] = vocabulary + slots[inverse] * each + feature
        return tokens, self._table.table

    def lost(self, pictures: Sequence[Picture]) -> str | None:
        """Why one of the pictures could not be read again in a step; None if all were."""
        found = (self._lost.get(picture.digest) for picture in pictures)
        return next(filter(None, found), None)


def with_pictures(
    config: Llama4Config,
    params: dict,
    texts: Mapping[str, Sequence[int] | np.ndarray],
    pictures: Sequence[Sequence[Picture]],
) -> tuple[list[Integer[np.ndarray, "tokens"]], Place]:
    """The tokens of texts with references to their pictures' features, and what places those.

    Args:
        texts: tokens, by what an error message calls them.
        pictures: of each text, in order; none if no text has any.

    Returns:
        The tokens of each text, and the function that `jaxmoe.model.steps.prefill` takes for them.

    Raises:
        UserError: if a text has more or fewer image tokens than its pictures have features, or if
            there are pictures and the model has no vision tower.
    """
    shown = any(map(len, pictures))
    if config.vision is None and not shown:  # an image token is one like any other
        return [np.asarray(tokens, np.int32) for tokens in texts.values()], without_features
    references = References(config, FeatureTable(config, params, tiles=TILES if shown else 0))
    rows = zip(texts.items(), pictures or [()] * len(texts), strict=True)
    return [references.of(*text, of_text) for text, of_text in rows], references.place


def with_references(
    config: Llama4Config, tokens: np.ndarray, numbers: np.ndarray
) -> Integer[np.ndarray, "tokens"]:
    """The tokens with `vocab_size + i` in place of each image token, i the next of the numbers."""
    found = np.array(tokens, np.int32)
    found[found == config.image_token_id] = config.vocab_size + np.asarray(numbers, np.int64)
    return found


def without_references(config: Llama4Config, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens of the vocabulary: the image token in place of references."""
    found = np.asarray(tokens)
    return np.where(found >= config.vocab_size, config.image_token_id, found)


def batches[T](tiles: Sequence[T]) -> Iterator[Sequence[T]]:
    """The tiles in as few batches as need no padding."""
    start = 0
    while start < len(tiles):
        size = next(size for size in BATCHES if size <= len(tiles) - start)
        yield tiles[start : start + size]
        start += size


@functools.partial(
    jax.jit,
    static_argnames=("config", "encode"),
    donate_argnames="table",
    compiler_options=KEEP_ROUNDINGS,
)
def _write(
    config: Llama4Config,
    encode: Encode,
    params: dict,
    pixels: UInt8[Array, "n side side channels"],
    table: Float[Array, "N D"],
    slots: Int[Array, "n"],
) -> Float[Array, "N D"]:
    """The table with the features of tiles in their places."""
    features = encode(config, params, pixels).astype(table.dtype)
    places = table.reshape(-1, *features.shape[1:])
    written = places.at[slots].set(features)
    return on_all_devices(written.reshape(table.shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype) -> jax.Array:
    return on_all_devices(jnp.zeros(shape, dtype))


@jax.jit
def _joined(table: jax.Array, more: jax.Array) -> jax.Array:
    return on_all_devices(jnp.concatenate([table, more]))
