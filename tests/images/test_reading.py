"""Pictures from every source and mode, and what is said of bad ones."""

import base64
import dataclasses
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.images import ImageSettings, PictureReader, decoding, network, open_picture
from jaxmoe.images.modes import to_rgb
from tests.images.cases import modes

SETTINGS = ImageSettings()
PLAIN = modes()["RGB"]
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}


def encoded(image=PLAIN, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(source, settings=SETTINGS, where="images[0]"):
    """What is seen of a source: the tiles of its picture."""
    return open_picture(source, settings, where).tiles()


def refused(source, *words, settings=SETTINGS):
    with pytest.raises(UserError) as caught:
        open_picture(source, settings, "images[0]")
    message = str(caught.value)
    assert message.startswith("images[0]") and "\n" not in message
    assert all(word in message for word in words), message


# Modes


@pytest.mark.parametrize("name", modes())
def test_each_mode_looks_as_in_transformers(name, golden):
    """Catches dropped alpha, alpha on black, transparent colours that are seen, inverted CMYK."""
    image = modes()[name]
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), golden[f"mode {name}"])


def test_premultiplied_alpha_is_laid_on_white():
    """transformers drops it; Pillow makes such images, and no file has them."""
    rgba = np.dstack([np.full((2, 2, 3), 90, np.uint8), np.array([[0, 255], [0, 255]], np.uint8)])
    found = np.asarray(to_rgb(Image.fromarray(rgba).convert("RGBa")))
    np.testing.assert_array_equal(found[..., 0], [[255, 90], [255, 90]])


def test_a_large_picture_is_laid_on_white_in_bands(monkeypatch, golden):
    monkeypatch.setattr("jaxmoe.images.modes._BAND", 7 * 32)
    found = np.asarray(to_rgb(modes()["RGBA"]))
    np.testing.assert_array_equal(found, golden["mode RGBA"])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_16_bits_keeps_its_shades(mode):
    """Catches pictures that are cut off at 255, and so white."""
    values = np.linspace(0, 65535, 24 * 32).round().astype(np.uint16).reshape(24, 32)
    image = Image.fromarray(values)
    image = image if mode == "I;16" else image.convert("I").convert(mode)
    grey = np.asarray(to_rgb(image))[..., 0]
    np.testing.assert_array_equal(grey, np.round(values / 257).astype(np.uint8))
    assert (grey.min(), grey.max()) == (0, 255) and len(np.unique(grey)) == 256


def test_grey_of_16_bits_in_a_file():
    values = (np.arange(24 * 32, dtype=np.uint16) * 85).reshape(24, 32)
    file = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(file)).mode == "I;16"
    grey = decoding.decode(file, "x", exif=True)
    np.testing.assert_array_equal(np.asarray(grey)[..., 0], np.round(values / 257))
    seen = np.asarray(decoding.decode(with_chunk(file, b"tRNS", b"\0\0"), "x", exif=True))[..., 0]
    assert seen[0, 0] == 255 and seen[0, 1] == 0  # 0 is transparent, 85 is not


@pytest.mark.parametrize("mode", ["F", "LAB", "HSV"])
def test_other_modes_are_refused_by_name(mode):
    image = Image.new(mode, (8, 8)) if mode != "HSV" else PLAIN.convert("HSV")
    refused(image, f"mode {mode}", "convert it to RGB")


def test_whole_numbers_of_more_than_16_bits_are_refused():
    refused(Image.fromarray(np.array([[0, 70_000]], np.int32)), "from 0 to 70000")
    refused(Image.fromarray(np.array([[-1, 7]], np.int32)), "from -1 to 7")


# Files


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_read_as_pillow_reads_it(format, tmp_path):
    file = tmp_path / f"a.{FORMATS[format]}"
    file.write_bytes(encoded(format=format))
    with Image.open(file) as image:
        whole = image.convert("RGB")
    np.testing.assert_array_equal(pixels(file), pixels(whole))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_is_seen(format):
    red, blue = (Image.new("RGB", (20, 20), name) for name in ("red", "blue"))
    file = encoded(red, format, save_all=True, append_images=[blue], lossless=True)
    assert Image.open(io.BytesIO(file)).n_frames == 2
    np.testing.assert_array_equal(pixels(file)[0, 100, 100], [255, 0, 0])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_a_picture(format, turn):
    image = Image.new("RGB", (400, 200), "red")
    image.paste("blue", (0, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = turn
    file = encoded(image, format, exif=exif.tobytes(), quality=95)
    turned = np.asarray(decoding.decode(file, "x", exif=True)).astype(int)
    corners = turned[[10, 10, -10, -10], [10, -10, 10, -10]]
    blue = int(np.argmax(corners[:, 2]))
    assert blue == {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[turn]
    assert turned.shape[:2] == ((200, 400) if turn < 5 else (400, 200))
    assert open_picture(file, SETTINGS, "x").grid == ((1, 2) if turn < 5 else (2, 1))
    left = dataclasses.replace(SETTINGS, exif=False)
    assert open_picture(file, left, "x").grid == (1, 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_costs_no_picture():
    assert pixels(encoded(PLAIN, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape[0] == 1


def test_a_pillow_image_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (400, 200)), "JPEG", exif=exif)))
    picture = open_picture(image, SETTINGS, "x")
    assert picture.grid == (2, 1) and picture.tiles().shape[0] == 3


# Sources


SOURCES = {
    "path": lambda file, *_: str(file),
    "pathlib": lambda file, *_: file,
    "file URL": lambda file, *_: file.as_uri(),
    "file URL with a host": lambda file, *_: file.as_uri().replace("//", "//localhost", 1),
    "data URL": lambda file, content, text, url: url,
    "data URL in percent": lambda file, content, text, url: (
        "data:image/png," + "".join(f"%{byte:02x}" for byte in content)
    ),
    "bytes": lambda file, content, *_: content,
    "bytearray": lambda file, content, *_: bytearray(content),
    "Pillow": lambda *_: PLAIN,
    "array": lambda *_: np.asarray(PLAIN),
    "parquet": lambda file, content, *_: {"bytes": content, "path": "gone.png"},
    "parquet's path": lambda file, *_: {"bytes": None, "path": str(file)},
    "image_url": lambda file, content, text, url: {"image_url": {"url": url, "detail": "high"}},
    "image_url as text": lambda file, content, text, url: {"type": "image_url", "image_url": url},
    "input_image": lambda file, content, text, url: {
        "type": "input_image",
        "image_url": url,
        "detail": "auto",
    },
    "image": lambda *_: {"type": "image", "image": PLAIN},
    "image's path": lambda file, *_: {"type": "image", "path": str(file)},
    "image's url": lambda file, *_: {"type": "image", "url": file.as_uri()},
    "base64": lambda file, content, text, url: {"type": "image", "base64": text},
    "base64 in lines": lambda file, content, text, url: {"base64": f"{text[:40]}\n{text[40:]}"},
    "data": lambda file, content, text, url: {"data": text, "mimeType": "image/png"},
    "data as an URL": lambda file, content, text, url: {"type": "image", "data": url},
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_picture_from_anywhere_is_the_same(name, tmp_path):
    file, content = tmp_path / "a picture.png", encoded()
    file.write_bytes(content)
    text = base64.b64encode(content).decode()
    url = f"data:image/png;base64,{text}"
    found = open_picture(SOURCES[name](file, content, text, url), SETTINGS, "x")
    known = open_picture(PLAIN, SETTINGS, "y")
    assert found == known and found.digest == known.digest
    assert not isinstance(found.source, Path) or found.source.is_absolute()
    np.testing.assert_array_equal(found.tiles(), known.tiles())


def test_other_pixels_or_another_grid_have_another_digest():
    black = np.zeros((336, 672, 3), np.uint8)
    other = black.copy()
    other[335, 671, 2] = 1
    found = [open_picture(x, SETTINGS, "x") for x in (black, other, black.swapaxes(0, 1))]
    assert len({picture.digest for picture in found}) == 3 and len(set(found)) == 3


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_arrays_of_grey(dtype):
    values = np.eye(40, dtype=dtype) * dtype(np.iinfo(dtype).max if dtype is not bool else True)
    wanted = pixels((np.eye(40) * 255).astype(np.uint8))
    np.testing.assert_array_equal(pixels(values), wanted)
    np.testing.assert_array_equal(pixels(values[..., None]), wanted)


def test_relative_paths_begin_at_the_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded())
    picture = PictureReader(SETTINGS, tmp_path / "in").open("a.png", "x")
    assert picture == open_picture(PLAIN, SETTINGS, "x")
    monkeypatch.chdir(tmp_path)
    relative = open_picture("in/a.png", SETTINGS, "x")
    monkeypatch.chdir("/")
    assert relative.tiles().shape == (1, 336, 336, 3)


def test_a_file_that_comes_again_is_decoded_once(tmp_path, monkeypatch):
    file, decodes = tmp_path / "a.png", []
    file.write_bytes(encoded())
    decode = decoding.decode
    monkeypatch.setattr(
        "jaxmoe.images.picture.decode", lambda *given: decodes.append(1) or decode(*given)
    )
    reader = PictureReader(SETTINGS)
    first, second = reader.open(str(file), "messages[0]"), reader.open(file, "messages[1]")
    assert len(decodes) == 1 and first == second
    assert first.name.startswith("messages[0]") and second.name.startswith("messages[1]")
    file.write_bytes(encoded(PLAIN.rotate(90, expand=True)))
    assert reader.open(file, "x") != first and len(decodes) == 2


def test_a_picture_does_not_keep_its_pixels(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.new("RGB", (2000, 2000))))
    picture = open_picture(file, SETTINGS, "x")
    kept = [value for value in vars(picture).values() if isinstance(value, bytes | np.ndarray)]
    assert sum(map(len, kept)) < 100
    kept = open_picture(Image.new("RGB", (2000, 2000)), SETTINGS, "x").source.content
    assert len(kept) < 100_000


def test_a_file_that_changed_is_refused_when_its_tiles_are_needed(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded())
    picture = open_picture(file, SETTINGS, "images[0]")
    file.write_bytes(encoded(PLAIN.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    with pytest.raises(UserError, match=r"a\.png'\) has changed since it was checked"):
        picture.tiles()
    file.unlink()
    with pytest.raises(UserError, match=r"a\.png' cannot be read"):
        picture.tiles()


# Bad ones


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_a_file_that_is_cut_off_is_refused(format, part, tmp_path):
    file = tmp_path / f"cut.{FORMATS[format]}"
    noise = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    content = encoded(Image.fromarray(noise), format)
    file.write_bytes(content[: int(len(content) * part)])
    refused(file, "cut.", "is damaged or cut off")


def with_chunk(png, kind, content):
    """A PNG file with another chunk after its header."""
    chunk = kind + content
    whole = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + whole + png[33:]


def png_of(width, height):
    """The beginning of a PNG file that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "to_rgb", lambda image: pytest.fail("it is decoded"))
    bomb = zlib.compress(b"\0" * 10_000_000)
    data = (
        struct.pack(">I", len(bomb))
        + b"IDAT"
        + bomb
        + struct.pack(">I", zlib.crc32(b"IDAT" + bomb))
    )
    refused(png_of(10_000, 10_000) + data, "10000 x 10000 pixels", "are refused")
    gif = encoded(PLAIN, "GIF")
    refused(gif[:6] + struct.pack("<HH", 10_000, 9_000) + gif[10:], "10000 x 9000 pixels")
    refused(Image.new("1", (10_000, 9_000)), "10000 x 9000 pixels")


def test_sizes_of_zero_are_refused():
    refused(Image.new("RGB", (0, 5)), "0 x 5 pixels")
    refused(np.zeros((0, 5, 3), np.uint8), "uint8[0, 5, 3]")
    refused(png_of(0, 5) + b"\0" * 100, "is damaged")


BAD = {
    "nothing": (b"", ["is empty"]),
    "text": (b"not a picture", ["is no picture of a known format", "JPEG, PNG, WebP or GIF"]),
    "BMP": (b"BM" + bytes(99), ["of the format BMP"]),
    "PDF": (b"%PDF-1.7", ["of the format PDF"]),
    "HEIC": (b"\0\0\0\x18ftypheic", ["of the format HEIC"]),
    "a missing file": ("gone.png", ["gone.png", "No such file"]),
    "a folder": ("/", ["is no file"]),
    "a device": ("/dev/zero", ["is no file"]),
    "a name with NUL": ("a\0b", ["cannot be read"]),
    "half a surrogate pair": ("\ud800", ["cannot be read"]),
    "another host": ("file://there/a.png", ["a file of another host"]),
    "a data URL without data": ("data:image/png;base64", ["without data"]),
    "no base64": ({"base64": "@@@"}, ["no base64"]),
    "base64 that is cut off": ({"data": "abcde"}, ["no base64"]),
    "nothing to open": ({"type": "image"}, ["has no picture", "image_url"]),
    "a number": (3, ["is 3, which is no picture"]),
    "None": (None, ["is None, which is no picture"]),
    "a list": ([1], ["which is no picture"]),
    "a mapping in itself": ({"image_url": {"detail": "low"}}, ["has no picture"]),
    "numbers with a point": (np.zeros((4, 4, 3)), ["float64[4, 4, 3]", "uint8 array"]),
    "channels first": (np.zeros((3, 40, 40), np.uint8), ["uint8[3, 40, 40]"]),
    "an URL": ("https://example.org/a.png", ["https://example.org", "--allow-network"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_named(name):
    source, words = BAD[name]
    refused(source, *words)


def test_text_with_a_pictures_name(tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("hello")
    refused(file, "notes.png", "is no picture of a known format")


# The network, of which this machine is all


@pytest.fixture
def server():
    """The address of a server, and what it answers: `{path: (status, headers, body)}`."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[self.path]
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", answers
        found.shutdown()
        thread.join()


def test_the_network_is_used_where_it_is_allowed(server, monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url, answers = server
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded())
    answers["/a.png"] = (200, {}, encoded())
    answers["/moved"] = (302, {"Location": "/a.png"}, b"")
    answers["/file"] = (302, {"Location": secret.as_uri()}, b"")
    answers["/gone"] = (404, {}, b"")
    answers["/text"] = (200, {}, b"hello")
    answers["/large"] = (200, {}, bytes(3000))
    allowed = dataclasses.replace(SETTINGS, allow_network=True)
    for path in ("/a.png", "/moved"):
        assert open_picture(url + path, allowed, "x") == open_picture(PLAIN, SETTINGS, "x")
    refused(f"{url}/file", "cannot be fetched", settings=allowed)
    refused(f"{url}/gone", "cannot be fetched", "Not Found", settings=allowed)
    refused(f"{url}/text", "is no picture of a known format", settings=allowed)
    refused(f"{url}/a.png", "nothing is fetched from a network")
    monkeypatch.setattr(network, "MAX_BYTES", 2000)
    refused(f"{url}/large", "more than 2000 bytes", settings=allowed)
    monkeypatch.setattr(network, "SECONDS", -1)
    refused("http://127.0.0.1:1/a.png", "cannot be fetched", settings=allowed)
