"""Draft heads, published ones and ours."""

import functools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.heads import convert_head, load_head
from jaxmoe.checkpoint.store import read_config
from jaxmoe.mesh import MeshConfig
from tests import tiny
from tests.eagle import head_config, head_tensors
from tests.fuzz.runner import Kind

HEAD = head_config(hidden_size=16, intermediate_size=16, vocab_size=64, draft_vocab_size=24)


@functools.cache
def _target() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-target-"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16}
    config = tiny.scout_like(**sizes, num_hidden_layers=1, num_local_experts=2, vocab_size=64)
    tiny.write_checkpoint(folder / "hf", config, tiny.random_tensors(config, 0))
    convert(folder / "hf", folder / "checkpoint")
    shutil.rmtree(folder / "hf")
    return folder / "checkpoint"


def _write_source(folder: Path) -> None:
    tiny.write_checkpoint(folder, HEAD, head_tensors(HEAD, 0))


def _read_source(folder: Path) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory(prefix="fuzz-head-") as scratch:
        convert_head(folder, Path(scratch, "head"), _target())
        return _read(Path(scratch, "head"))


def _write(folder: Path) -> None:
    _write_source(folder.parent / "head source")
    folder.rmdir()
    convert_head(folder.parent / "head source", folder, _target())


def _read(folder: Path) -> dict[str, np.ndarray]:
    mesh = MeshConfig().make(jax.devices()[:1])
    head = load_head(folder, mesh, read_config(_target()))
    leaves = jax.tree_util.tree_leaves_with_path((head.params, head.token_ids))
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {"config": np.frombuffer(repr(head.config).encode(), np.uint8)} | found


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


def _all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


HEAD_KINDS = (
    Kind("published head", _write_source, _read_source, _same, _all_files),
    Kind("head", _write, _read, _same, _all_files, checked=True),
)
