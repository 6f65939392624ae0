"""Pictures of drawn pixels, which no file has."""

import dataclasses

from jaxmoe.images.picture import Picture, digest_of
from jaxmoe.images.settings import ImageSettings
from tests import vision


@dataclasses.dataclass(frozen=True)
class Drawn(Picture):
    """A picture whose tiles are those of `vision.tiles`."""

    image: vision.Image = vision.ONE

    def tiles(self):
        return vision.tiles(self.image, self.settings.tile_size)


def drawn(image, side=vision.SIDE, each=9):
    grid = image.rows, image.columns
    digest = digest_of(grid, vision.tiles(image, side))
    return Drawn(str(image), grid, digest, b"", ImageSettings(side, each), image)
