"""From pictures in files, URLs and arrays to the tiles and tokens that Llama 4 has for them."""

from jaxmoe.images.picture import Picture
from jaxmoe.images.reading import PictureReader, open_picture
from jaxmoe.images.settings import ImageSettings, read_image_settings
from jaxmoe.images.tokens import ImageTokens

__all__ = [
    "ImageSettings",
    "ImageTokens",
    "Picture",
    "PictureReader",
    "open_picture",
    "read_image_settings",
]
