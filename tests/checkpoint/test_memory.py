"""Converting needs memory for a few blocks, loading for the model and one share.

Peaks are what the kernel counts: the high-water mark of resident memory (VmHWM) of a process of its
own, over its mark once everything is imported. Shared library pages count; pages of files read do
not, as nothing is mapped.
"""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]

# Two layers of Scout with two experts each and a small vocabulary: every tensor but the embedding
# has the shape, and so the blocks, of the real model.
CONFIG = tiny.published_scout() | {
    "num_hidden_layers": 2,
    "num_local_experts": 2,
    "vocab_size": 16384,
    "torch_dtype": "bfloat16",
}

PEAK = """
import sys
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""
CONVERT = """
from jaxmoe.checkpoint.convert import convert
before = peak()
convert(*sys.argv[1:])
print(peak() - before)
"""
LOAD = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxmoe.checkpoint.store import load
from jaxmoe.mesh import MeshConfig
mesh = MeshConfig.parse("fsdp=8").make()
before = peak()
jax.block_until_ready(load(sys.argv[1], mesh))
print(peak() - before)
"""


def measure(code, *arguments):
    """How many bytes the peak memory of a new process rises while it runs `code`."""
    command = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def write_sparse_checkpoint(folder):
    """Writes a sparse safetensors file; returns the size of its data in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    fields, end = {}, 0
    for name, shape in tiny.tensor_shapes(CONFIG).items():
        begin, end = end, end + 2 * math.prod(shape)
        fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + end)
    return end


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


@pytest.mark.slow
def test_peak_memory_of_converting_and_loading_2_gb(folder):
    """The half gigabyte beyond the model is about one share and what the allocator keeps."""
    size = write_sparse_checkpoint(folder / "hf")
    assert size > 2e9
    assert measure(CONVERT, folder / "hf", folder / "orbax") < 600e6
    assert measure(LOAD, folder / "orbax") < size + 500e6
