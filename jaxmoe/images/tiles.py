"""Cuts a picture into tiles: the canvas, the size on it, the tiles and the global tile.

The rules, and where they compute in float32, are those of transformers' Llama 4 image processor.
Its resizing differs from the one here, Pillow's, by one level of 255 at most.
"""

import functools
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxmoe.images.settings import ImageSettings

Grid = tuple[int, int]  # rows and columns of tiles
Size = tuple[int, int]  # height and width, in pixels


def choose_grid(size: Size, settings: ImageSettings) -> Grid:
    """The rows and columns of tiles that a picture of some size is laid on.

    It is the grid that enlarges the picture least, else the one that shrinks it least, and of equal
    ones the smallest. With `resize_to_max_canvas` it is the one that enlarges the picture most.
    """
    grids = _grids(settings.max_tiles)
    scales = (grids * np.float32(settings.tile_size) / np.asarray(size, np.float32)).min(axis=1)
    larger = scales[scales >= 1]
    if larger.size:
        scale = larger.max() if settings.resize_to_max_canvas else larger.min()
    else:
        scale = scales.max()
    chosen = grids[scales == scale]
    rows, columns = chosen[chosen.prod(axis=1).argmin()]
    return int(rows), int(columns)


@functools.cache
def _grids(max_tiles: int) -> np.ndarray:
    """All rows and columns of at most so many tiles, as [n, 2] in float32."""
    sides = range(1, max_tiles + 1)
    pairs = [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]
    return np.array(pairs, np.float32)


def fit(size: Size, grid: Grid, settings: ImageSettings) -> Size:
    """The size that a picture has on its canvas: the same shape, rounded down.

    Without `resize_to_max_canvas`, no side grows beyond that of one tile.
    """
    limits = [_limit(*sides, settings) for sides in zip(size, grid, strict=True)]
    # A float32 quotient meets a float64 one in float32, in NumPy as in torch.
    by_height, by_width = (limit / length for limit, length in zip(limits, size, strict=True))
    height, width = int(limits[0]), int(limits[1])
    if by_width < by_height:
        height = min(math.floor(size[0] * by_width), height)
    else:
        width = min(math.floor(size[1] * by_height), width)
    return max(height, 1), max(width, 1)


def _limit(length: int, tiles: int, settings: ImageSettings) -> int | np.float32:
    """The most pixels of one side: a float32 where the canvas is what bounds it."""
    canvas = tiles * settings.tile_size
    wanted = max(length, settings.tile_size)
    if settings.resize_to_max_canvas or canvas < wanted:
        return np.float32(canvas)
    return wanted


def cut(image: Image.Image, settings: ImageSettings) -> tuple[Grid, UInt8[np.ndarray, "n s s 3"]]:
    """The grid of an RGB image, and its tiles.

    The tiles are those of the grid row by row, black where the picture leaves the canvas empty. If
    there are several, the whole picture follows as a last one, its shape ignored.
    """
    side, size = settings.tile_size, (image.height, image.width)
    rows, columns = grid = choose_grid(size, settings)
    height, width = fit(size, grid, settings)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:height, :width] = _resized(image, (height, width))
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(image, (side, side))[None]])
    return grid, tiles


def _resized(image: Image.Image, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
