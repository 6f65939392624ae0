"""Writes heads in the published layout."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmoe.checkpoint.formats.safetensors import SINGLE, TensorToWrite, write_file
from jaxmoe.checkpoint.heads.layout import LAYERS, OFFSETS, groups_of, named_head_specs
from jaxmoe.eagle_config import EagleConfig, eagle_to_hf
from jaxmoe.files.workspace import RESULT, prepared


def write_head(
    folder: str | Path,
    config: EagleConfig,
    params: dict,
    token_ids: Any,
    layers: int,
) -> None:
    """Writes `config.json` and `model.safetensors`, without embeddings, which are the target's.

    Every host calls it, and the first writes. After an error nothing of the output is left.

    Args:
        folder: must not exist or be empty.
        config: of the head.
        params: as `jaxmoe.model.eagle.eagle_specs` declares them.
        token_ids: the target's id [G] of each token of the draft vocabulary.
        layers: how many the target has.

    Raises:
        UserError: if `folder` exists and is not empty, it cannot be written, or the head's layer
            ids can be misread.
    """
    named = dict(zip(named_head_specs(config), map(_on_host, jax.tree.leaves(params)), strict=True))
    content = eagle_to_hf(config, layers, named["fc"].dtype.name)
    tensors = []
    for group in groups_of(config, LAYERS[0]):
        ((name, shape),) = group.tensors.items()
        stored = group.layout.join([named[group.params[0]]]).reshape(shape)
        tensors.append(_tensor(name, stored))
    offsets = np.asarray(token_ids, np.int64) - np.arange(config.draft_vocab_size)
    tensors.append(_tensor(OFFSETS, offsets))
    if jax.process_index() == 0:
        with prepared(Path(folder)) as workspace:
            result = workspace / RESULT
            result.mkdir()
            collections.deque(write_file(result / SINGLE, tensors), maxlen=0)
            (result / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxmoe.write_head")


def _on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _tensor(name: str, x: np.ndarray) -> TensorToWrite:
    def blocks() -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(x)

    return TensorToWrite(name, x.shape, x.dtype, blocks)
