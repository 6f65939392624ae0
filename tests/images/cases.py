"""What transformers is asked about pictures: sizes, photographs and modes.

Imports Pillow and NumPy only, since the oracle's environment reads it, too.
"""

import dataclasses

import numpy as np
from PIL import Image

SEED = 11
STRIDE = 7  # of the rows and columns of a tile that are kept: a prime, so that they meet all phases


@dataclasses.dataclass(frozen=True)
class Cut:
    """How pictures are cut: the names are those of `ImageSettings`."""

    max_tiles: int = 16
    resize_to_max_canvas: bool = False


CUTS = {
    "usual": (Cut(), 10_000),
    "four": (Cut(max_tiles=4), 1000),
    "one": (Cut(max_tiles=1), 200),
    "seven": (Cut(max_tiles=7), 1000),
    "largest": (Cut(resize_to_max_canvas=True), 1000),
}


TOKENS_PER_TILE = 144
TOKENS = [
    *("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
]


def grids() -> list[tuple[int, int]]:
    """All rows and columns of at most 16 tiles."""
    sides = range(1, 17)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= 16]


def sizes(count: int) -> np.ndarray:
    """Heights and widths: of any scale, of any shape, and around multiples of a tile's side."""
    draw = np.random.default_rng(SEED)
    found = np.exp(draw.uniform(0, np.log(8000), (count, 2))).astype(int)
    near = draw.random((count, 2)) < 0.3
    multiples = 336 * draw.integers(1, 17, (count, 2)) + draw.integers(-1, 2, (count, 2))
    found = np.where(near, multiples, found)
    square = draw.random(count) < 0.05
    found[square, 1] = found[square, 0]
    return found


@dataclasses.dataclass(frozen=True)
class Shot:
    """A part of a photograph, `(left, upper, right, lower)`; None is all of it."""

    photo: str
    box: tuple | None = None
    cut: Cut = dataclasses.field(default_factory=Cut)

    def open(self, folder) -> Image.Image:
        image = Image.open(f"{folder}/{self.photo}").convert("RGB")
        return image if self.box is None else image.crop(self.box)


DOG, PASTA = "dog.jpg", "pasta.jpeg"  # 512 x 512 and 1280 x 1280
SHOTS = {
    "dog": Shot(DOG),
    "pasta": Shot(PASTA),
    "shrunk": Shot(PASTA, cut=Cut(max_tiles=4)),
    "one tile": Shot(PASTA, (100, 0, 1080, 777), Cut(max_tiles=1)),
    "enlarged": Shot(DOG, cut=Cut(resize_to_max_canvas=True)),
    "small": Shot(DOG, (200, 100, 350, 300)),
    "tall": Shot(PASTA, (500, 0, 660, 1280)),
    "wide": Shot(PASTA, (0, 600, 1280, 690)),
    "strip": Shot(PASTA, (0, 600, 1200, 604)),
    "wider than 16 tiles": Shot(PASTA, (0, 600, 1280, 601), Cut(max_tiles=3)),
    "pixel": Shot(DOG, (250, 250, 251, 251)),
}


def modes() -> dict[str, Image.Image]:
    """A small image of each mode that files have."""
    y, x = np.mgrid[0:24, 0:32]
    rgb = np.stack([x * 8, y * 10, (x * y) % 256], -1).astype(np.uint8)
    alpha = ((x * 9 + y * 5) % 256).astype(np.uint8)
    colour, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 2])
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    palette = colour.quantize(64)
    index, table = palette.copy(), palette.copy()
    index.info["transparency"] = 5
    table.info["transparency"] = bytes(range(0, 256, 4))
    key = colour.copy()
    key.info["transparency"] = tuple(map(int, rgb[3, 4]))
    grey_key = grey.copy()
    grey_key.info["transparency"] = 60
    return {
        "RGB": colour,
        "RGB with a transparent colour": key,
        "RGBA": rgba,
        "L": grey,
        "L with a transparent grey": grey_key,
        "LA": rgba.convert("LA"),
        "PA": _with_alpha_palette(palette, alpha),
        "1": grey.convert("1"),
        "P": palette,
        "P with a transparent colour": index,
        "P with transparencies": table,
        "CMYK": colour.convert("CMYK"),
        "YCbCr": colour.convert("YCbCr"),
    }


def _with_alpha_palette(palette: Image.Image, alpha: np.ndarray) -> Image.Image:
    image = palette.convert("PA")
    image.putalpha(Image.fromarray(alpha))
    return image
