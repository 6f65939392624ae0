"""Canvases, tiles and tokens equal to those of transformers' image processor, with torchvision."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.images import ImageSettings, ImageTokens, open_picture
from jaxmoe.images.tiles import choose_grid, cut, fit
from tests.images.cases import CUTS, SHOTS, STRIDE, TOKENS, TOKENS_PER_TILE, grids, sizes

ENLARGED = "enlarged"  # which no released checkpoint asks for


def settings_of(given, **others):
    return ImageSettings(**dataclasses.asdict(given), **others)


@pytest.mark.parametrize("name", CUTS)
def test_every_size_has_the_canvas_of_transformers_and_its_size_on_it(name, golden):
    """Catches scales in float64, areas before scales, ceilings for floors, a side of 0."""
    given, count = CUTS[name]
    settings = settings_of(given)
    found = []
    for height, width in sizes(count).tolist():
        grid = choose_grid((height, width), settings)
        found.append([*grid, *fit((height, width), grid, settings)])
    np.testing.assert_array_equal(found, golden[f"canvas {name}"])


@pytest.mark.parametrize("name", [name for name in SHOTS if name != ENLARGED])
def test_photographs_are_within_one_level_of_torchvision(name, photos, golden):
    """Catches no antialiasing, another filter, a global tile of the canvas, tiles out of order."""
    assert distances(SHOTS[name], photos, golden[f"pixels {name}"]).max() <= 1


def test_what_is_enlarged_is_within_two_levels(photos, golden):
    """torch rounds the weights of its resizing to 16 bits, and an enlargement shows it."""
    found = distances(SHOTS[ENLARGED], photos, golden[f"pixels {ENLARGED}"])
    assert found.max() <= 2 and (found > 1).mean() < 1e-4


def distances(shot, photos, wanted):
    _, tiles = cut(shot.open(photos), settings_of(shot.cut))
    return np.abs(tiles[:, ::STRIDE, ::STRIDE].astype(int) - wanted)


@pytest.mark.parametrize(("name", "grid"), [("dog", (2, 2)), ("pasta", (4, 4))])
def test_what_fits_is_not_resized(name, grid, photos, golden):
    shot = SHOTS[name]
    photo = np.asarray(shot.open(photos))
    found, tiles = cut(shot.open(photos), ImageSettings())
    rows, columns = grid
    whole = np.block([[[tiles[y * columns + x]] for x in range(columns)] for y in range(rows)])
    height, width, _ = photo.shape
    assert found == grid and len(tiles) == rows * columns + 1
    np.testing.assert_array_equal(whole[:height, :width], photo)
    assert not whole[height:].any() and not whole[:, width:].any()
    local = tiles[:-1, ::STRIDE, ::STRIDE]
    np.testing.assert_array_equal(local, golden[f"pixels {name}"][:-1])


@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((1, 1), (1, 1), 1),
        ((336, 336), (1, 1), 1),
        ((337, 337), (2, 2), 5),
        ((300, 800), (1, 3), 4),
        ((1080, 1920), (3, 5), 16),
        ((1, 5000), (1, 15), 16),
        ((20, 6000), (1, 16), 17),
        ((4000, 500), (8, 1), 9),
    ],
)
def test_grids_that_are_known(size, grid, tiles):
    picture = open_picture(np.zeros((*size, 3), np.uint8), ImageSettings(), "x")
    assert (picture.grid, picture.num_tiles) == (grid, tiles)
    assert picture.tiles().shape == (tiles, 336, 336, 3)
    assert picture.num_features == 144 * tiles


@pytest.mark.parametrize("grid", grids())
def test_tokens_are_those_of_transformers(grid, golden):
    names = dict(zip(TOKENS, range(len(TOKENS)), strict=True))
    found = ImageTokens.of(names).layout(grid, TOKENS_PER_TILE)
    np.testing.assert_array_equal(found, golden["layout {} x {}".format(*grid)])


def test_the_tokens_of_two_by_two_tiles():
    ids = ImageTokens.of(dict(zip(TOKENS, map(ord, "SEIPXY"), strict=True)))
    assert text(ids.layout((2, 2), 2)) == "SPPXPPYPPXPPYIPPE"
    assert text(ids.layout((1, 1), 2)) == "SIPPE"
    expanded = ids.expand(map(ord, "aIIb"), [(1, 1), (2, 1)], 1)
    assert text(expanded) == "a" + "SIPE" + "SPYPYIPE" + "b"
    with pytest.raises(UserError, match="given: 1, places for them in the text: 2"):
        ids.expand(map(ord, "aIIb"), [(1, 1)], 1)


def text(ids):
    return "".join(map(chr, ids))


def test_a_tokenizer_without_the_tokens_is_named():
    names = {name: i for i, name in enumerate(TOKENS) if name != "<|tile_y_separator|>"}
    with pytest.raises(UserError, match=r"no special token <\|tile_y_separator\|>"):
        ImageTokens.of(names)


def test_tiles_of_another_side():
    settings = ImageSettings(tile_size=28, tokens_per_tile=1)
    image = Image.fromarray(np.arange(28 * 56, dtype=np.uint8).reshape(28, 56)).convert("RGB")
    grid, tiles = cut(image, settings)
    assert grid == (1, 2) and tiles.shape == (3, 28, 28, 3)
    np.testing.assert_array_equal(np.hstack(list(tiles[:2])), np.asarray(image))
