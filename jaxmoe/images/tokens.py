"""The tokens that stand for a picture in the text model's sequence."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from jaxmoe.errors import UserError

IMAGE = "<|image|>"  # marks a picture's place in a text, and its global tile among its tokens

_NAMES = {
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "image": IMAGE,
    "patch": "<|patch|>",
    "x_separator": "<|tile_x_separator|>",
    "y_separator": "<|tile_y_separator|>",
}


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The ids of the special tokens of pictures.

    Attributes:
        start, end: around a picture.
        image: before its last tile, which is the only one or the global one.
        patch: at each place of one of the tower's features.
        x_separator: between two tiles of a row.
        y_separator: after each row of several tiles.
    """

    start: int
    end: int
    image: int
    patch: int
    x_separator: int
    y_separator: int

    @classmethod
    def of(cls, specials: Mapping[str, int]) -> "ImageTokens":
        """The ids among a tokenizer's special tokens, which are given by name.

        Raises:
            UserError: if it lacks one of them.
        """
        missing = [name for name in _NAMES.values() if name not in specials]
        if missing:
            raise UserError(
                f"the tokenizer has no special token {missing[0]}, which pictures need; use the "
                "one of the model"
            )
        return cls(**{field: specials[name] for field, name in _NAMES.items()})

    def layout(self, grid: tuple[int, int], tokens_per_tile: int) -> list[int]:
        """The tokens of a picture of so many rows and columns of tiles."""
        rows, columns = grid
        tile = [self.patch] * tokens_per_tile
        ids = [self.start]
        if rows * columns > 1:
            row = [*tile, *[self.x_separator, *tile] * (columns - 1), self.y_separator]
            ids += row * rows
        return [*ids, self.image, *tile, self.end]

    def expand(
        self, ids: Iterable[int], grids: Sequence[tuple[int, int]], tokens_per_tile: int
    ) -> list[int]:
        """Tokens with each `image` among them replaced by a picture's tokens, first to last.

        Raises:
            UserError: if there are not as many of them as pictures.
        """
        ids = list(ids)
        check_places(ids.count(self.image), len(grids))
        left = iter(grids)
        expanded: list[int] = []
        for id_ in ids:
            expanded += self.layout(next(left), tokens_per_tile) if id_ == self.image else [id_]
        return expanded


def check_places(places: int, pictures: int) -> None:
    """Raises a UserError unless there are as many places for pictures as pictures."""
    if places != pictures:
        raise UserError(
            f"pictures that are given: {pictures}, places for them in the text: {places}; write "
            f"<image> or {IMAGE} where each belongs"
        )
