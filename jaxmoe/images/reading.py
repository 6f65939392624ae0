"""Reads pictures from all that users have: files, URLs, bytes, base64, arrays, Pillow's images."""

import base64
import binascii
import dataclasses
import hashlib
import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.images.decoding import prepare
from jaxmoe.images.known import Known
from jaxmoe.images.network import fetch
from jaxmoe.images.picture import Picture, make_picture, picture_of
from jaxmoe.images.settings import ImageSettings

SOURCE_KEYS = ("image_url", "image", "url", "path", "base64", "data", "bytes")

_ENCODED = ("base64", "data")  # keys whose texts are base64, or a data: URL
_NETWORK = ("http://", "https://")
_SHAPES = "a bool, uint8 or uint16 array [height, width], or a uint8 array [height, width, 3 or 4]"


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Opens the pictures of one call or one job; what comes again is read and decoded once.

    Attributes:
        settings: how they become tiles.
        folder: that relative paths begin at.
    """

    settings: ImageSettings
    folder: Path = Path()
    _known: Known = dataclasses.field(default_factory=Known, repr=False)

    def open(self, source: Any, where: str) -> Picture:
        """The picture from a source; arguments and errors are those of `open_picture`."""
        return open_picture(source, self.settings, where, self.folder, self._known)


def open_picture(
    source: Any,
    settings: ImageSettings,
    where: str,
    folder: Path = Path(),  # a path cannot change
    known: Known | None = None,
) -> Picture:
    """The picture from a source, which is decoded once to check it.

    Args:
        source: a path; an URL with file:, data:, http: or https:; the bytes of a file; a Pillow
            image; an array of pixels; or a mapping with one of these as `bytes`, `path`, `url`,
            `image` or `image_url`, or with the base64 of a file as `base64` or `data`.
        settings: how it becomes tiles.
        where: the place of the source in the request, for error messages.
        folder: that relative paths begin at.
        known: pictures that were opened before; it is added to.

    Raises:
        UserError: if there is no picture that can be used, or it is to be fetched from a network
            and the settings do not allow it.
    """
    if isinstance(source, Mapping):
        source = _of_mapping(source, where)
    known = known or Known()
    if isinstance(source, str) and source[:8].lower().startswith(_NETWORK):
        return _of_network(source, settings, where, known)
    if isinstance(source, str):
        source = _of_text(source, where)
    if isinstance(source, os.PathLike):
        return _of_file(Path(folder, source).absolute(), settings, where, known)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        key = hashlib.sha256(content).digest(), settings
        return _known_as(where, known, key, lambda: make_picture(content, where, settings))
    if isinstance(source, Image.Image):
        return picture_of(prepare(source, where, settings.exif), where, settings)
    if hasattr(source, "__array__"):
        image = _of_array(np.asarray(source), where)
        return picture_of(prepare(image, where, exif=False), where, settings)
    raise UserError(
        f"{where} is {source!r:.80}, which is no picture; give a path, an URL, bytes, a Pillow "
        "image or an array."
    )


def _of_mapping(source: Mapping[str, Any], where: str) -> Any:
    """The source that a mapping holds: bytes come before their path, as in parquet files."""
    given = [key for key in ("bytes", *SOURCE_KEYS) if source.get(key) is not None]
    if not given:
        raise UserError(f"{where} has no picture; give it one of {', '.join(SOURCE_KEYS)}.")
    value = source[given[0]]
    if given[0] in _ENCODED and isinstance(value, str) and not value.startswith("data:"):
        return _from_base64(value, where)
    return _of_mapping(value, where) if isinstance(value, Mapping) else value


def _known_as(name: str, known: Known, key: tuple, make: Callable[[], Picture]) -> Picture:
    return dataclasses.replace(known.get(key, make), name=name)


def _of_network(url: str, settings: ImageSettings, where: str, known: Known) -> Picture:
    name = f"{where} ({url!r:.80})"
    if not settings.allow_network:
        raise UserError(
            f"{where} is {url!r:.80}, and nothing is fetched from a network unless "
            "--allow-network or ImageSettings(allow_network=True) says so."
        )
    key = url, settings
    return _known_as(name, known, key, lambda: make_picture(fetch(url, name), where, settings))


def _of_text(text: str, where: str) -> Path | bytes:
    """The path or the content that a text names."""
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        return _of_data_url(text, where)
    if scheme.startswith("file:"):
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{where} is {text!r:.80}, a file of another host; copy it here.")
        return Path(urllib.request.url2pathname(parts.path))
    return Path(text)


def _of_data_url(text: str, where: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise UserError(f"{where} is a data: URL without data; write data:image/png;base64,...")
    if head.lower().endswith(";base64"):
        return _from_base64(urllib.parse.unquote(body), where)
    return urllib.parse.unquote_to_bytes(body)


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} is no base64 ({error}); encode the whole file.") from None


def _of_file(path: Path, settings: ImageSettings, where: str, known: Known) -> Picture:
    name = f"{where} ({str(path)!r})"
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name} cannot be read: {reason}; check its name.") from None
    if not path.is_file():  # a pipe would never end
        raise UserError(f"{name} is no file; give the picture itself.")
    key = (path, found.st_mtime_ns, found.st_size, settings)
    return _known_as(name, known, key, lambda: make_picture(path, name, settings))


def _of_array(pixels: np.ndarray, where: str) -> Image.Image:
    """An array of pixels as an image."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    is_grey = pixels.ndim == 2 and pixels.dtype in (np.bool_, np.uint8, np.uint16)
    is_colour = pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8
    if not pixels.size or not (is_grey or is_colour):
        raise UserError(f"{where} is {pixels.dtype}{list(pixels.shape)}; give {_SHAPES}.")
    return Image.fromarray(pixels)
