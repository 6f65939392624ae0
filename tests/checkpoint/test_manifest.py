"""A checkpoint whose content is not what was written under each name is refused."""

import hashlib
import itertools
import logging
import shutil
import subprocess

import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.mapping import tensors
from jaxmoe.checkpoint.zarr import arrays, checksums
from jaxmoe.checkpoint.zarr.checksums import CHECKSUMS, Grid
from jaxmoe.checkpoint.zarr.manifest import FORMAT, MANIFEST, MARKER, STATE, ZARR, digest_of
from jaxmoe.errors import UserError
from tests import tiny
from tests.checkpoint.damage import (
    change_description,
    change_metadata,
    exchange,
    flipped,
    made_old,
)
from tests.conftest import one_device

CONFIG = tiny.maverick_like(num_hidden_layers=2, interleave_moe_layer_step=1, num_local_experts=2)
BIG = 10**12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    return tiny.write_checkpoint(folder, CONFIG, tiny.random_tensors(CONFIG, seed=1))


def made(source, folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", 9000)  # two files an array, and chunks in each
        patch.setattr(arrays, "CHUNK_BYTES", 3000)
        convert(source, folder, **options)
    return folder


@pytest.fixture(scope="module")
def pristine(source, tmp_path_factory):
    """A checkpoint that tests must not change."""
    return made(source, tmp_path_factory.mktemp("pristine") / "orbax")


@pytest.fixture
def copy(pristine, tmp_path):
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(pristine, tmp_path / "orbax")


@pytest.fixture
def old(copy):
    return made_old(copy, store.KEY)


def refusal(path):
    with pytest.raises(UserError) as caught:
        store.load(path, one_device())
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith("."), message
    return message


def read_arrays(path, names):
    opened = store.read_checkpoint(path)
    for name, shape in opened.shapes().items():
        if name in names:
            opened.open_array(name, shape).check()


def equal_pairs(path):
    shapes = store.read_checkpoint(path).shapes()
    return [
        pair for pair in itertools.combinations(shapes, 2) if len({*map(shapes.get, pair)}) == 1
    ]


def blocks(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("c/**/*") if path.is_file())


@pytest.mark.parametrize("what", ["folder", "data", "block and checksums"])
def test_arrays_that_were_exchanged(copy, what):
    """Exchanges two arrays of the same shape: every file is whole, but belongs to the other."""
    pairs = equal_pairs(copy)
    assert len(pairs) > 30
    for names in pairs:
        one, other = (copy / STATE / name for name in names)
        block = max({*blocks(one)} & {*blocks(other)})
        parts = {"folder": [""], "data": ["c"], "block and checksums": [block, CHECKSUMS]}
        for part in parts[what]:
            exchange(one / part, other / part)
        with pytest.raises(UserError, match=r"another array's|is not the file that|damaged"):
            read_arrays(copy, names)
        for part in parts[what]:
            exchange(one / part, other / part)
        read_arrays(copy, names)


def test_blocks_of_one_array_that_were_exchanged(copy):
    name = "layers.0.feed_forward.experts.up"
    first, *_, last = blocks(copy / STATE / name)
    exchange(copy / STATE / name / first, copy / STATE / name / last)
    assert name in refusal(copy)


def test_an_array_of_another_time(copy, tmp_path):
    """Replaces arrays by those of a model with other weights."""
    tiny.write_checkpoint(tmp_path / "hf", CONFIG, tiny.random_tensors(CONFIG, seed=7))
    other = made(tmp_path / "hf", tmp_path / "other")
    shutil.rmtree(copy / STATE / "lm_head")
    shutil.copytree(other / STATE / "lm_head", copy / STATE / "lm_head")
    assert "lm_head" in refusal(copy)


@pytest.mark.parametrize(
    "file", [MARKER, MANIFEST, f"{STATE}/norm/{ZARR}", f"{STATE}/norm/{CHECKSUMS}"]
)
def test_any_flipped_bit(copy, file):
    content = (copy / file).read_bytes()
    for byte in range(0, len(content), 1 + len(content) // 150):
        (copy / file).write_bytes(flipped(content, byte))
        with pytest.raises(UserError, match=r"\.$"):
            read_arrays(copy, ["norm"])
    (copy / file).write_bytes(content)
    read_arrays(copy, ["norm"])


def test_any_flipped_byte_of_data(copy):
    """Flips bytes of chunks, of their checksums, and of the index of the file."""
    file = copy / STATE / "norm/c/0"
    content = file.read_bytes()
    for byte in range(0, len(content), 3):
        file.write_bytes(flipped(content, byte))
        with pytest.raises(UserError, match="is damaged"):
            read_arrays(copy, ["norm"])


@pytest.mark.parametrize("file", [MANIFEST, f"{STATE}/norm/{CHECKSUMS}", f"{STATE}/norm/{ZARR}"])
def test_a_file_that_is_missing(copy, file):
    (copy / file).unlink()
    assert file in refusal(copy)


@pytest.mark.parametrize(
    "key, value", [("rope_theta", 2e4), ("attn_scale", 0.2), ("floor_scale", 8)]
)
def test_another_valid_config(copy, key, value):
    config = {**store_config(copy), key: value}
    change_metadata(copy, store.KEY, {"config": config})
    assert MANIFEST in refusal(copy)


def store_config(path):
    return store.read_checkpoint(path).finished.metadata["config"]


def test_checksums_of_sha256sum(pristine):
    """The tool `sha256sum` can read and check the manifest."""
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    command = ["sha256sum", "--check", "--strict", "--quiet", MANIFEST]
    assert subprocess.run(command, cwd=pristine, check=False).returncode == 0


def test_verify_and_export_notice(source, copy, tmp_path):
    verify(source, copy)
    one, other = (copy / STATE / f"layers.{n}.feed_forward.shared.up" for n in (0, 1))
    exchange(one / "c", other / "c")
    with pytest.raises(UserError, match="another array's"):
        verify(source, copy)
    with pytest.raises(UserError, match="another array's"):
        export(copy, tmp_path / "out")


def test_quantized_arrays_are_bound(source, tmp_path):
    quantized = made(source, tmp_path / "orbax", weights="int8")
    one, other = (quantized / STATE / f"layers.{n}.attention.q.scale" for n in (0, 1))
    exchange(one / "c", other / "c")
    assert "layers.0.attention.q.scale" in refusal(quantized)


def test_bytes_read_beside_the_data(pristine, monkeypatch):
    """For each chunk, loading onto one device reads its checksum, offset and size once more."""
    opened = store.read_checkpoint(pristine).open_arrays()
    read, original = [], checksums._read
    monkeypatch.setattr(checksums, "_read", lambda *x: read.append(x[1]) or original(*x))
    store.load(pristine, one_device())
    chunks = sum(array.checksums.size for array in opened.values())
    assert sum(read) == (4 + 16) * chunks > 0


# What was saved from memory


@pytest.fixture
def saved(pristine, tmp_path):
    config, params = store.load(pristine, one_device())
    store.save(tmp_path / "saved", config, params)
    return tmp_path / "saved"


def test_saved_arrays_are_bound(saved):
    one, other = (saved / STATE / f"layers.{n}.attention.k" for n in (0, 1))
    exchange(one / "c", other / "c")
    assert "layers.0.attention.k" in refusal(saved)


def test_saved_twice_is_the_same(saved, tmp_path):
    config, params = store.load(saved, one_device())
    store.save(tmp_path / "again", config, params)
    assert (saved / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()


def test_equal_models_of_other_numbers_have_other_names(saved, tmp_path):
    """Catches a digest of the metadata only, which two runs of one config share."""
    config, params = store.load(saved, one_device())
    store.save(tmp_path / "same", config, params)
    params["embed"] = params["embed"] + 1
    store.save(tmp_path / "other", config, params)
    markers = {(path / MARKER).read_bytes() for path in (saved, tmp_path / "other")}
    assert len(markers) == 1
    assert digest_of(saved) == digest_of(tmp_path / "same") != digest_of(tmp_path / "other")


def test_a_line_of_the_manifest_that_lists_nothing(copy):
    """Catches a traceback for a damaged line under a right digest, which anyone can compute."""
    (copy / MANIFEST).write_text(f"x\n# {hashlib.sha256(b'x' + bytes([10])).hexdigest()}\n")
    with pytest.raises(UserError, match=f"is not the file that {MANIFEST} lists"):
        store.read_checkpoint(copy)


def test_a_flipped_bit_in_what_was_saved(saved):
    file = saved / STATE / "embed/c/0/0"
    file.write_bytes(flipped(file.read_bytes(), 1000))
    assert "embed" in refusal(saved)


# Checkpoints of format 2, without a manifest


def test_an_older_checkpoint_loads(pristine, old, caplog):
    """It is loaded with one warning, no matter how often."""
    with caplog.at_level(logging.WARNING):
        config, params = store.load(old, one_device())
        store.load(old, one_device())
    (record,) = caplog.records
    assert record.message.startswith(f"{old} has no {MANIFEST}") and record.message.endswith(".")
    expected = store.load(pristine, one_device())
    assert config == expected[0]
    np.testing.assert_array_equal(params["lm_head"], expected[1]["lm_head"])


@pytest.mark.parametrize("dtype", ["uint32", "int32", "float8_e4m3fn", "bool", ["float32"], 7])
def test_a_dtype_that_no_weight_has(old, dtype):
    change_description(old, "embed", lambda found: found.update(data_type=dtype))
    assert "embed" in refusal(old)


CHANGES = {
    "shape": lambda found: found.update(shape=[BIG, 64]),
    "blocks": lambda found: found["chunk_grid"]["configuration"].update(chunk_shape=[BIG, 64]),
    "no blocks": lambda found: found["chunk_grid"].pop("configuration"),
    "blocks of text": lambda found: found["chunk_grid"]["configuration"].update(chunk_shape="x"),
    "no shape": lambda found: found.pop("shape"),
    "chunks": lambda found: found["codecs"][0]["configuration"].update(chunk_shape=[BIG, 64]),
    "both": lambda found: (
        found["chunk_grid"]["configuration"].update(chunk_shape=[BIG, 64]),
        found["codecs"][0]["configuration"].update(chunk_shape=[BIG, 64]),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_descriptions_that_do_not_fit(old, change):
    """Some would make TensorStore allocate more memory than there is."""
    change_description(old, "embed", CHANGES[change])
    assert "embed" in refusal(old)


def with_config(**changes):
    return lambda path: {"config": {**store_config(path), **changes}}


METADATA = {
    "no config": lambda path: {"config": ...},
    "config of text": lambda path: {"config": "llama"},
    "no format": lambda path: {"format": ...},
    "format of text": lambda path: {"format": "2"},
    "format true": lambda path: {"format": True},
    "formats of a list": lambda path: {"formats": [1]},
    "formats unknown": lambda path: {"formats": {"layers.0.attention.q": ["int7", 64]}},
    "formats of no width": lambda path: {"formats": {"layers.0.attention.q": ["int8", 0]}},
    "formats of a norm": lambda path: {"formats": {"norm": ["int8", 64]}},
    "formats cut short": lambda path: {"formats": {"layers.0.attention.q": ["int8"]}},
    "outer of a list": lambda path: {"outer": []},
    "experts": with_config(num_local_experts=2**40),
    "layers": with_config(
        num_hidden_layers=10**9, layer_types=[], no_rope_layers=[], moe_layers=[]
    ),
}


@pytest.mark.parametrize("change", METADATA)
def test_metadata_that_make_no_sense(old, change):
    change_metadata(old, store.KEY, METADATA[change](old))
    refusal(old)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 10**5, '{"custom_metadata": []}', "NaN", "1" * 5000]
)
def test_metadata_that_are_none(old, text):
    (old / MARKER).write_text(text)
    refusal(old)


@pytest.mark.parametrize(
    "conversion", [[], {"sources": 1}, {"sources": [1]}, {"sources": [], "weights": []}]
)
def test_a_conversion_that_makes_no_sense(source, old, conversion):
    change_metadata(old, store.KEY, {"conversion": conversion})
    with pytest.raises(UserError, match="does not say what it was made of"):
        verify(source, old)


def test_a_newer_format(copy):
    change_metadata(copy, store.KEY, {"format": FORMAT + 1, "version": "9.9"})
    assert "'9.9'; update jaxmoe" in refusal(copy)


# Which chunks a slice lies in


@pytest.mark.parametrize("seed", range(5))
def test_touched_chunks(seed):
    """Compares with the blocks and chunks of every single element."""
    draw = np.random.default_rng(seed)
    shape = tuple(draw.integers(1, 20, 3).tolist())
    chunk = tuple(draw.integers(1, 4, 3).tolist())
    grid = Grid(
        shape, tuple(c * int(n) for c, n in zip(chunk, draw.integers(1, 4, 3), strict=True)), chunk
    )
    spans = [sorted(draw.integers(0, n + 1, 2).tolist()) for n in shape[:2]]
    index = tuple(slice(*span, int(draw.integers(1, 4))) for span in spans)
    expected = set()
    for place in itertools.product(*(range(n) for n in shape)):
        if all(
            i in range(*s.indices(n)) for i, s, n in zip(place[:2], index, shape[:2], strict=True)
        ):
            block = tuple(i // b for i, b in zip(place, grid.block, strict=True))
            inner = [i % b // c for i, b, c in zip(place, grid.block, chunk, strict=True)]
            expected.add((block, int(np.ravel_multi_index(inner, grid.chunks))))
    found = [(block, n) for block, numbers in grid.touched(index) for n in numbers.tolist()]
    assert len(found) == len(set(found)) and set(found) == expected
