"""Turns images of all of Pillow's usual modes into RGB."""

import numpy as np
from PIL import Image

_PLAIN = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BAND = 2**20  # pixels that are laid on white at once, which bounds the memory for it


class UnusableImage(ValueError):
    """Why an image cannot be used; the message completes a sentence that names it."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB: transparent parts are white, and 16 bits of grey become 8.

    Raises:
        UnusableImage: if its mode is none of those that pictures have.
    """
    if image.mode in _GREY_16:
        image = _grey_of_16_bits(image)
    if image.mode not in (*_PLAIN, *_WITH_ALPHA):
        raise UnusableImage(f"has the mode {image.mode}, which is not supported; convert it to RGB")
    if image.mode in _WITH_ALPHA or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """The image laid on white, some rows at a time."""
    if image.mode in ("RGBa", "La"):  # premultiplied; Pillow converts them in this way only
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    whole = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        band = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        whole.paste(Image.alpha_composite(white, band).convert("RGB"), box)
    return whole


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits, rounded; the value that a PNG file calls transparent becomes white."""
    values = np.asarray(image)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        raise UnusableImage(
            f"has whole numbers from {least} to {most} as pixels; grey of 16 bits ends at 65535"
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
