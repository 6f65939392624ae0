"""How pictures become tiles and tokens: by the vision tower's sizes and the checkpoint's files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config import VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.parsing import read_json

MOST_TILES = 1024  # of a picture, at most: all grids of so many tiles are compared

_FILES = ("processor_config.json", "preprocessor_config.json")  # the first one that describes it
# What a file may say of the steps that are fixed here, with the tolerance of rounded decimals;
# true is 1.
_FIXED = {
    "image_mean": (0.5, 1e-6),
    "image_std": (0.5, 1e-6),
    "rescale_factor": (1 / 255, 1e-6),
    "resample": (2.0, 0.0),  # bilinear
    "do_resize": (1.0, 0.0),
    "do_rescale": (1.0, 0.0),
    "do_normalize": (1.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How pictures become tiles and tokens.

    Attributes:
        tile_size: side of a tile, in pixels.
        tokens_per_tile: that stand for a tile in the text model's sequence.
        max_tiles: of one picture, at most, without the global one; fewer cost fewer tokens.
        resize_to_max_canvas: enlarges a picture as far as the tiles allow.
        exif: whether the orientation in a file's EXIF data turns the picture, as viewers do.
        allow_network: whether http and https URLs are fetched.
    """

    tile_size: int = 336
    tokens_per_tile: int = 144
    max_tiles: int = 16
    resize_to_max_canvas: bool = False
    exif: bool = True
    allow_network: bool = False

    def __post_init__(self):
        if not 1 <= self.max_tiles <= MOST_TILES:
            raise UserError(f"max_tiles {self.max_tiles} is not from 1 to {MOST_TILES}.")

    @classmethod
    def of(cls, vision: VisionConfig) -> "ImageSettings":
        """The settings for a vision tower, where the checkpoint says no more."""
        return cls(tile_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile)


def read_image_settings(folder: str | Path, vision: VisionConfig) -> ImageSettings:
    """The settings for a vision tower, with those in a checkpoint folder's files.

    The files are `processor_config.json` and `preprocessor_config.json`; there need be none.

    Raises:
        UserError: if a file is broken, or asks for steps other than those of Llama 4.
    """
    settings = ImageSettings.of(vision)
    for path in (Path(folder) / name for name in _FILES):
        found = _image_processor(path) if path.exists() else None
        if found is not None:
            return _with(settings, found, path)
    return settings


def _image_processor(path: Path) -> Mapping[str, Any] | None:
    """What a file says of images; None if it says nothing."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; download it again.")
    if path.name == _FILES[0]:
        content = content.get("image_processor")
    return content if isinstance(content, dict) else None


def _with(settings: ImageSettings, found: Mapping[str, Any], path: Path) -> ImageSettings:
    given = {key: value for key, value in found.items() if value is not None}
    side = settings.tile_size
    if given.get("size", side) not in (side, {"height": side, "width": side}):
        raise UserError(f"{path} has size {given['size']!r:.80}; the vision tower takes {side}.")
    for key, (value, tolerance) in _FIXED.items():
        if key in given and not _is_close(given[key], value, tolerance):
            raise UserError(f"{path} has {key} {given[key]!r:.80}; only {value:g} is supported.")
    most = given.get("max_patches", settings.max_tiles)
    largest = given.get("resize_to_max_canvas", False)
    if type(most) is not int or not 1 <= most <= MOST_TILES:
        raise UserError(f"{path} has max_patches {most!r:.80}, not from 1 to {MOST_TILES}.")
    if type(largest) is not bool:
        raise UserError(f"{path} has resize_to_max_canvas {largest!r:.80}, not true or false.")
    return dataclasses.replace(settings, max_tiles=most, resize_to_max_canvas=largest)


def _is_close(given: Any, value: float, tolerance: float) -> bool:
    """Whether a number, or each of a list, is the value."""
    numbers = given if isinstance(given, list) and given else [given]
    return all(isinstance(x, int | float) and abs(x - value) <= tolerance for x in numbers)
