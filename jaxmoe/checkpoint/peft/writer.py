"""Writes adapters that PEFT reads."""

import collections
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmoe.checkpoint.formats.safetensors import TensorToWrite, write_file
from jaxmoe.checkpoint.peft.layout import (
    INNER,
    NEWER,
    OLDER,
    ExpertLayout,
    Target,
    from_factors,
    targets,
    tensor_names,
)
from jaxmoe.checkpoint.peft.reader import TENSORS
from jaxmoe.checkpoint.peft.settings import FILE
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import RESULT, prepared
from jaxmoe.model.lora import LoraMatrix
from jaxmoe.model.params import named_params

VERSIONS = {OLDER: "0.18.1", NEWER: "0.21.2"}  # of PEFT, whose files are like those written here


def write_adapter(
    folder: str | Path,
    config: Llama4Config,
    params: dict,
    *,
    rslora: bool = False,
    layout: ExpertLayout = NEWER,
) -> None:
    """Writes the adapters of a model's parameters, and nothing else of them.

    Every host calls it, and the first writes. After an error nothing of the output is left.

    Args:
        folder: must not exist or be empty.
        config: of the model.
        params: some of them `LoraMatrix`; the others, and the bases, may be None.
        rslora: whether the scales are meant as alpha / sqrt(r).
        layout: PEFT's version whose layout the experts get; others do not read it.

    Raises:
        UserError: if there are no adapters, `folder` exists and is not empty, or it cannot be
            written.
    """
    named = {name: w for name, (_, w) in named_params(config, params).items()}
    adapted = [t for t in targets(config) if isinstance(named[t.params[0]], LoraMatrix)]
    if not adapted:
        raise UserError(f"there is no adapter to be written to {folder}.")
    tensors = []
    for target in adapted:
        a, b = _gathered(target, named)
        pair = from_factors(target, a, b, layout)
        for name, x in zip(tensor_names(_module(target, adapted)), pair, strict=True):
            blocks = functools.partial(_one_block, x)
            tensors.append(TensorToWrite(name, x.shape, x.dtype, blocks))
    if jax.process_index() == 0:
        with prepared(Path(folder)) as workspace:
            result = workspace / RESULT
            result.mkdir()
            collections.deque(write_file(result / TENSORS, tensors), maxlen=0)
            content = _settings(adapted, named, rslora) | {"peft_version": VERSIONS[layout]}
            (result / FILE).write_text(json.dumps(content, indent=2) + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxmoe.write_adapter")


def _gathered(target: Target, named: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A target's a and b on this host; gate and up side by side."""
    matrices = [named[param] for param in target.params]
    b = np.concatenate([_on_host(w.b) for w in matrices], axis=-1)
    return _on_host(matrices[0].a), b


def _on_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _one_block(x: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(x)


def _module(target: Target, adapted: list[Target]) -> str:
    """The module's name in the file: PEFT wraps experts once for each tensor that is adapted."""
    both = sum(other.module == target.module for other in adapted) > 1
    return target.module + (INNER if both and target.key.endswith(".gate_up_proj") else "")


def _settings(adapted: list[Target], named: dict[str, Any], rslora: bool) -> dict[str, Any]:
    """The content of `FILE` but for the version: the commonest rank and alpha, and exceptions."""
    matrices = {target.parameter or target.key: named[target.params[0]] for target in adapted}
    ranks = {key: w.rank for key, w in matrices.items()}
    alphas = {key: _alpha(w, rslora) for key, w in matrices.items()}
    (rank, _), *_ = collections.Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key: r for key, r in ranks.items() if r != rank},
        "alpha_pattern": {key: x for key, x in alphas.items() if x != alpha},
        "use_rslora": rslora,
        "target_modules": [target.key for target in adapted if not target.parameter],
        "target_parameters": [target.parameter for target in adapted if target.parameter],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _alpha(w: LoraMatrix, rslora: bool) -> int | float:
    """What `scale` was made of."""
    alpha = round(w.scale * (math.sqrt(w.rank) if rslora else w.rank), 9)
    return int(alpha) if alpha.is_integer() else alpha
