"""Two hosts, as processes with four devices each: each reads its own devices' shares, no more."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import arrays, store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.evaluate import token_logits
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
tokens = np.load(f"{checkpoint}/../tokens.npy")
everywhere = NamedSharding(mesh, PartitionSpec())
with jax.set_mesh(mesh):
    found = np.asarray(jax.jit(logits, out_shardings=everywhere)(params))
np.save(f"{checkpoint}/../logits.{rank}.npy", found)
print(json.dumps({"loading": loading, "shares": sum(shares.values())}))
"""


def on_two_hosts(*arguments):
    """What each of two processes that form one mesh prints."""
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
        answers = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


@pytest.mark.parametrize(
    ("spec", "weights", "part"), [("fsdp=8", None, 0.5), ("expert=2,tensor=4", "int8", 0.8)]
)
def test_each_host_reads_its_own_shares(spec, weights, part, tmp_path, monkeypatch):
    """Half, or on a mesh whose hosts divide the experts only, half of those and all of the rest."""
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
