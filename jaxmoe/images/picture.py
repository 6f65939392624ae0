"""`Picture`: a picture of a request, which is decoded when its tiles are needed."""

import dataclasses
import hashlib
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.images.decoding import decode
from jaxmoe.images.settings import ImageSettings
from jaxmoe.images.tiles import Grid, cut
from jaxmoe.parsing import read_bytes


@dataclasses.dataclass(frozen=True)
class PackedTiles:
    """Tiles in little memory.

    Attributes:
        content: compressed.
        shape: of their array.
    """

    content: bytes
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, tiles: UInt8[np.ndarray, "tiles side side 3"]) -> "PackedTiles":
        """The tiles of an array."""
        return cls(zlib.compress(np.ascontiguousarray(tiles).data, level=1), tiles.shape)

    def unpack(self) -> UInt8[np.ndarray, "tiles side side 3"]:
        """The array of the tiles."""
        return np.frombuffer(zlib.decompress(self.content), np.uint8).reshape(self.shape)


Source = Path | bytes | PackedTiles


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was read and checked once, and whose pixels are not kept.

    Attributes:
        name: for error messages.
        grid: rows and columns of its tiles.
        digest: of its tiles; pictures with the same one look the same to the model.
        source: the file, the content of one, or the tiles of a picture that was in no file.
        settings: by which it is cut.
    """

    name: str = dataclasses.field(compare=False)
    grid: Grid
    digest: bytes
    source: Source = dataclasses.field(compare=False, repr=False)
    settings: ImageSettings = dataclasses.field(compare=False, repr=False)

    @property
    def num_tiles(self) -> int:
        """The tiles of the grid, and the global one if there are several."""
        rows, columns = self.grid
        return rows * columns + (rows * columns > 1)

    @property
    def num_features(self) -> int:
        """The places of the tower's features among its tokens."""
        return self.num_tiles * self.settings.tokens_per_tile

    def tiles(self) -> UInt8[np.ndarray, "tiles side side 3"]:
        """The tiles of the grid row by row, then the global one if there are several.

        Raises:
            UserError: if the file has changed since it was checked.
        """
        if isinstance(self.source, PackedTiles):
            return self.source.unpack()
        grid, tiles = cut(_decoded(self.source, self.name, self.settings), self.settings)
        if digest_of(grid, tiles) != self.digest:
            raise UserError(f"{self.name} has changed since it was checked; start again.")
        return tiles


def make_picture(source: Path | bytes, name: str, settings: ImageSettings) -> Picture:
    """The picture in a file or in the content of one, which is decoded once to check it.

    Raises:
        UserError: if it cannot be read.
    """
    grid, tiles = cut(_decoded(source, name, settings), settings)
    return Picture(name, grid, digest_of(grid, tiles), source, settings)


def picture_of(image: Image.Image, name: str, settings: ImageSettings) -> Picture:
    """The picture in an RGB image, whose tiles are kept: a whole one may be much larger."""
    grid, tiles = cut(image, settings)
    return Picture(name, grid, digest_of(grid, tiles), PackedTiles.pack(tiles), settings)


def digest_of(grid: Grid, tiles: UInt8[np.ndarray, "tiles side side 3"]) -> bytes:
    """Tells tiles that differ apart."""
    digest = hashlib.sha256(repr((grid, tiles.shape)).encode())
    digest.update(np.ascontiguousarray(tiles).data)
    return digest.digest()


def _decoded(source: Path | bytes, name: str, settings: ImageSettings) -> Image.Image:
    content = source if isinstance(source, bytes) else read_bytes(source)
    return decode(content, name, settings.exif)
