"""Reads the model to plan for: a preset by name, or a checkpoint's folder."""

from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import heads, store
from jaxmoe.config import PRESETS, Llama4Config
from jaxmoe.eagle_config import EagleConfig, default_layer_ids, read_eagle_config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_config, read_object, stated_dtype


def read_model(text: str) -> Llama4Config:
    """The configuration of a preset, of a folder with `config.json`, or of a converted checkpoint.

    Raises:
        UserError: if there is no such model.
    """
    if text in PRESETS:
        return PRESETS[text]
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(
            f"model '{text}' is neither {' nor '.join(PRESETS)} nor a folder with a config.json "
            "or a converted checkpoint."
        )
    if (folder / "config.json").exists():
        return read_config(folder)
    return store.read_config(folder)


def read_head(text: str, target: Llama4Config) -> EagleConfig:
    """The numbers of a head's folder, converted or as it is published.

    Raises:
        UserError: if there is no head, or it is of another model than the target.
    """
    if heads.is_head(text):  # which layers it reads changes no plan
        return read_eagle_config(text, target, default_layer_ids(target.num_hidden_layers))[0]
    heads.check_head(text, target)
    return heads.read_head_config(text)


def read_dtype(text: str) -> Any:
    """The dtype that a model's configuration or checkpoint states; None for a preset.

    Args:
        text: as of `read_model`.
    """
    if text in PRESETS:
        return None
    if (Path(text) / "config.json").exists():
        return stated_dtype(read_object(text, "config.json"))
    return store.read_checkpoint(text).stated
