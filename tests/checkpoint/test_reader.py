"""The safetensors reader reads what the `safetensors` library wrote, and refuses bad files."""

import json
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.errors import UserError
from tests import tiny

CONFIG = tiny.scout_like(num_hidden_layers=1)
TENSORS = tiny.random_tensors(CONFIG, seed=0)
Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    return tiny.write_checkpoint(tmp_path / "hf", CONFIG, TENSORS, shards=3)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        SafetensorsFolder(folder)
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("count", [1, 3])
def test_reads_what_was_written(tmp_path, count):
    folder = SafetensorsFolder(tiny.write_checkpoint(tmp_path, CONFIG, TENSORS, count))
    assert folder.tensors.keys() == TENSORS.keys()
    assert len(folder.files) == count
    for name, tensor in TENSORS.items():
        assert folder.tensors[name].shape == tensor.shape
        np.testing.assert_array_equal(folder.read(name, 0, tensor.size), tensor.reshape(-1))
    np.testing.assert_array_equal(folder.read(Q, 7, 100), TENSORS[Q].reshape(-1)[7:107])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(tmp_path, dtype):
    tensor = np.arange(6).astype(np.float32).astype(np.dtype(dtype)).reshape(2, 3)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.read("a", 2, 2).tobytes() == tensor.reshape(-1)[2:4].tobytes()
    assert folder.dtype("a") == tensor.dtype


def test_other_dtypes_are_refused_by_name(tmp_path):
    save_file({"a": np.zeros(3, np.int16)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors holds a as I16"):
        SafetensorsFolder(tmp_path).read("a", 0, 1)


def test_empty_folder(tmp_path):
    refused(tmp_path, tmp_path, "model.safetensors.index.json")


def test_missing_shard(sharded):
    shards(sharded)[1].unlink()
    refused(sharded, shards(sharded)[0].parent, "model-00002-of-00003.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_shard(sharded, keep):
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(sharded, shard, "download it again")


def test_shard_that_shrinks_after_it_was_opened(sharded):
    folder = SafetensorsFolder(sharded)
    entry = folder.tensors[Q]
    entry.file.write_bytes(entry.file.read_bytes()[: entry.start + 10])
    with pytest.raises(UserError, match=rf"{entry.file.name} ends inside {Q}"):
        folder.read(Q, 0, TENSORS[Q].size)


@pytest.mark.parametrize("position", [0, 9, 40, 120])
def test_flipped_byte_in_a_header(sharded, position):
    shard = shards(sharded)[0]
    data = bytearray(shard.read_bytes())
    data[position] ^= 0xFF
    shard.write_bytes(data)
    refused(sharded, shard)


@pytest.mark.parametrize(
    "field",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        "F32",
    ],
)
def test_header_that_lies(tmp_path, field):
    header = json.dumps({"a": field}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path, file, "damaged header")


def write_places(file, places, nbytes=8, names="abc", **more):
    """Writes a file of one-byte numbers whose tensors have these offsets."""
    fields = {
        name: {"dtype": "I8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip(names, places, strict=False)
    }
    header = json.dumps(fields | more).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))


@pytest.mark.parametrize(
    "places, words",
    [
        ([(0, 4), (4, 4), (4, 8)], None),
        ([(4, 8), (0, 4)], None),
        ([(0, 4), (3, 8)], "the tensor b, which overlaps another"),
        ([(0, 8), (0, 8)], "the tensor b, which overlaps another"),
        ([(0, 8), (2, 4)], "the tensor b, which overlaps another"),
        ([(0, 3), (4, 8)], "the tensor b, which lies behind a hole"),
        ([(1, 8)], "the tensor a, which lies behind a hole"),
        ([(0, 7)], "but its header speaks of"),
        ([(0, 9)], "but its header speaks of"),
    ],
)
def test_every_byte_is_of_one_tensor(tmp_path, places, words):
    """Tensors may not overlap or leave holes, as in the safetensors library."""
    file = tmp_path / "model.safetensors"
    write_places(file, places)
    if words is None:
        safe_open(file, "np")
        SafetensorsFolder(tmp_path)
        return
    with pytest.raises(SafetensorError):
        safe_open(file, "np")
    refused(tmp_path, file, words)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": 1, "a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": {"dtype": "I8", "shape": [' + b"1," * 99 + b'8], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_no_parser_survives(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(tmp_path, file)


def test_one_tensor_in_two_shards(sharded):
    """It is refused, whichever shard the index names."""
    first, second, _ = shards(sharded)
    save_file({Q: TENSORS[Q]}, second)
    refused(sharded, f"{first} and {second} both hold the tensor {Q}")


def test_index_names_a_tensor_that_its_shard_lacks(sharded):
    first, second, _ = shards(sharded)
    edit_index(sharded, lambda names: names.update({"model.extra.weight": second.name}))
    refused(sharded, second, "lacks the tensor model.extra.weight")
    assert first.exists()


def test_index_places_a_tensor_in_the_wrong_shard(sharded):
    edit_index(sharded, lambda names: names.update({Q: shards(sharded)[2].name}))
    refused(sharded, Q, INDEX)


def test_shard_holds_a_tensor_that_the_index_does_not_name(sharded):
    edit_index(sharded, lambda names: names.pop(Q))
    refused(sharded, Q, INDEX)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "9" * 5000],
)
def test_unreadable_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    refused(tmp_path, tmp_path / INDEX)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "a/../../out.safetensors", "{out}", "link", "folder/out"]
)
def test_names_in_the_index_stay_in_the_folder(sharded, name):
    """The file outside is valid, so only its path can be the reason."""
    outside = sharded.parent / "out.safetensors"
    shards(sharded)[0].rename(outside)
    (sharded / "link").symlink_to(outside)
    (sharded / "folder").symlink_to(sharded.parent)
    outside.with_name("out").symlink_to(outside)
    name = name.format(out=outside)
    first = "model-00001-of-00003.safetensors"
    edit_index(sharded, lambda m: m.update({k: name for k, file in m.items() if file == first}))
    refused(sharded, sharded / INDEX, "outside", sharded)


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "circle", "\0"])
def test_names_in_the_index_that_no_file_has(sharded, name):
    (sharded / "circle").symlink_to("circle")
    edit_index(sharded, lambda m: m.update({k: name for k in m}))
    refused(sharded, sharded)


def test_hub_cache_keeps_files_beside_the_snapshot(tmp_path):
    """The hub's download cache has links from snapshots/<revision> to blobs."""
    folder = tiny.write_checkpoint(tmp_path / "snapshots/1234", CONFIG, TENSORS, shards=2)
    (tmp_path / "blobs").mkdir()
    for shard in shards(folder):
        shard.rename(tmp_path / "blobs" / shard.stem)
        shard.symlink_to(tmp_path / "blobs" / shard.stem)
    assert SafetensorsFolder(folder).tensors.keys() == TENSORS.keys()
