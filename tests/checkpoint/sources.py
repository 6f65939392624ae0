"""A small checkpoint to convert, and what it becomes on the way there and back."""

from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.formats.tensor_files import DTYPES
from tests import tiny

ROOT = Path(__file__).parents[2]
CONFIG = tiny.maverick_like(num_hidden_layers=4)  # dense and MoE, local and global
FLOATS = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}


def weights(dtype="float32", config=CONFIG):
    tensors = tiny.random_tensors(config, seed=1, dtype=FLOATS[dtype])
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return tensors


def checkpoint(folder, config=CONFIG, tensors=None, shards=1):
    return tiny.write_checkpoint(folder, config, tensors or weights(), shards)


def there_and_back(tmp_path, source):
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    return tmp_path / "back"


def read_all(folder):
    """All tensors of a folder by the safetensors library, whose NumPy part has no float8."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
            found[name] = found[name].reshape(tensor["shape"])
    return found


def assert_same_bytes(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name
