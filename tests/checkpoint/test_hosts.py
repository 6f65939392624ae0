"""Two hosts, processes with four devices each, read the shares of their own devices only."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.checkpoint.zarr import arrays
from jaxmoe.config import SCOUT
from jaxmoe.eval.logits import token_logits
from jaxmoe.model.params import named_specs
from tests import tiny
from tests.conftest import one_device

ROOT = Path(__file__).parents[2]
CONFIG = tiny.maverick_like(num_hidden_layers=4, hidden_size=256, intermediate_size=512)
TOKENS = np.arange(100, dtype=np.int32).reshape(2, 50)

HOST = """
import json, sys
import jax
rank, port, checkpoint, spec = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec
from jaxmoe.checkpoint import store
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.transformer import forward, unembed

def bytes_read():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])

def logits(params):
    shape = tokens.shape
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    out = forward(config, params, tokens, positions, np.ones(shape, np.int32))
    return unembed(config, params, out.hidden)

mesh = MeshConfig.parse(spec).make()
store.abstract(checkpoint, mesh)
opening = bytes_read()  # the arrays' metadata
config, params = store.load(checkpoint, mesh)
loading = bytes_read() - 2 * opening
shares = {}
for i, leaf in enumerate(jax.tree.leaves(params)):
    shares |= {(i, str(s.index)): s.data.nbytes for s in leaf.addressable_shards}
store.save(f"{checkpoint}/../saved", config, params)
tokens = np.load(f"{checkpoint}/../tokens.npy")
everywhere = NamedSharding(mesh, PartitionSpec())
with jax.set_mesh(mesh):
    found = np.asarray(jax.jit(logits, out_shardings=everywhere)(params))
np.save(f"{checkpoint}/../logits.{rank}.npy", found)
print(json.dumps({"loading": loading, "shares": sum(shares.values())}))
"""


def on_two_hosts(*arguments):
    """The outputs of two processes that form one mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(rank), str(port), *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while None in (codes := [host.poll() for host in hosts]) and not any(codes):
            time.sleep(0.1)
        assert not any(codes), f"exit codes {codes}"
        answers = [host.communicate()[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def test_shares_of_many_devices():
    """Devices read at most twice their share of the experts, which are nearly all of a model."""
    specs = named_specs(SCOUT)
    for group in expand(names.TEXT + names.FUSED + names.LAST, array_shapes(SCOUT, {})):
        if not names.has_experts(group.params[0]):
            continue
        chunk = arrays.even_part(group.array_block(2), 2, arrays.CHUNK_BYTES)
        sizes = zip(group.shape, chunk, strict=True)
        split = dict(zip(specs[group.params[0]].axes, sizes, strict=True))
        for axis, devices in {"embed": 32, "ffn": 16}.items():
            size, held = split[axis]
            assert size // devices % held == 0
        size, held = split["embed"]
        assert held <= 2 * size // 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "weights", "part"), [("fsdp=8", None, 0.5), ("expert=2,tensor=4", "int8", 0.8)]
)
def test_each_host_reads_its_own_shares(spec, weights, part, tmp_path, monkeypatch):
    """A host reads half of everything, or half of the experts where hosts divide only those."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**10)  # smaller than a share, as of real sizes
    tensors = tiny.random_tensors(CONFIG, seed=1)
    tiny.write_checkpoint(tmp_path / "hf", CONFIG, tensors)
    convert(tmp_path / "hf", tmp_path / "orbax", weights=weights)
    np.save(tmp_path / "tokens.npy", TOKENS)
    config, params = store.load(tmp_path / "orbax", one_device())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for rank, host in enumerate(on_two_hosts(tmp_path / "orbax", spec)):
        assert host["shares"] < (part + 0.05) * whole
        # Beyond its shares each chunk's checksum, its place in the file, and what is not split.
        assert host["shares"] <= host["loading"] < 1.15 * host["shares"], host
        logits = np.load(tmp_path / f"logits.{rank}.npy")
        assert abs(logits - token_logits(config, params, TOKENS)).max() < 1e-4
    _, saved = store.load(tmp_path / "saved", one_device())  # by both together
    for ours, theirs in zip(jax.tree.leaves(saved), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
