"""Decodes the bytes of picture files, which may come from anyone."""

import contextlib
import io
from collections.abc import Iterator

from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from jaxmoe.errors import UserError
from jaxmoe.images.modes import UnusableImage, to_rgb

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHERS = {  # formats that are taken for pictures, by how their files begin
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
}
_ISO = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


def decode(content: bytes, name: str, exif: bool) -> Image.Image:
    """The picture in the bytes of a JPEG, PNG, WebP or GIF file, in RGB; of several, the first.

    Args:
        name: of the picture, for error messages.
        exif: whether it is turned as its EXIF data say.

    Raises:
        UserError: if it is no such file, broken, too large, or of a mode that is not supported.
    """
    with _errors_named(name):
        return _prepared(_opener(content)(io.BytesIO(content)), exif)


def prepare(image: Image.Image, name: str, exif: bool) -> Image.Image:
    """A Pillow image in RGB; arguments and errors are those of `decode`."""
    with _errors_named(name):
        return _prepared(image, exif)


def _prepared(image: Image.Image, exif: bool) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise UnusableImage(f"has a size of {width} x {height} pixels; there is nothing to see")
    if width * height > MAX_PIXELS:
        raise UnusableImage(
            f"has {width} x {height} pixels, and more than {MAX_PIXELS} are refused; shrink it"
        )
    turn = _turn(image) if exif else None
    whole = to_rgb(image)
    return whole if turn is None else whole.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image is to be turned; broken EXIF data say nothing, and cost no picture."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as of any other broken part, Pillow may raise anything
        return None


def _opener(content: bytes) -> type[ImageFile]:
    """The reader of the format that a file's first bytes tell.

    `PIL.Image.open` tries formats that are not wanted here, and decides by a limit that is global
    what is too large.
    """
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if content.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return WebPImageFile
    found = [name for begin, name in _OTHERS.items() if content.startswith(begin)]
    if content[4:8] == b"ftyp":
        found += [name for brand, name in _ISO.items() if content[8:12] == brand]
    if not content:
        raise UnusableImage("is empty; give a JPEG, PNG, WebP or GIF file")
    is_what = f"is of the format {found[0]}" if found else "is no picture of a known format"
    raise UnusableImage(f"{is_what}; give a JPEG, PNG, WebP or GIF file")


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Makes a UserError of whatever Pillow raises for a broken file."""
    try:
        yield
    except UnusableImage as error:
        raise UserError(f"{name} {error}.") from None
    except Exception as error:  # decoders raise anything, such as SyntaxError for a checksum
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or cut off ({reason:.200}); get it anew.") from None
