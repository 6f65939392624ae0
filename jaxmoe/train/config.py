"""`TrainConfig`: everything that a training run depends on, read from one YAML file."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxmoe.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, and how they are cut into rows.

    Attributes:
        tokens: an `.npy` file of token ids [tokens]; every document begins with the model's
            `bos_token_id`.
        length: tokens a row.
        batch_size: rows a step, over the whole mesh.
        held_out_every: every so-manieth document is held out; 0 holds out none.
    """

    tokens: str
    length: int
    batch_size: int
    held_out_every: int = 0

    def __post_init__(self):
        if self.length < 2 or self.batch_size < 1:
            raise UserError(
                f"data length={self.length}, batch_size={self.batch_size}: a row has 2 tokens or "
                "more, and a batch one row or more."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, a cosine decay and clipping by global norm.

    Attributes:
        final_lr: the learning rate of the last step, as a fraction of `peak_lr`.
    """

    peak_lr: float
    warmup_steps: int = 100
    final_lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a Hugging Face `config.json`, written out.
        output: the run's folder: checkpoint, metrics, and what a killed run resumes from.
        steps: optimizer steps in all.
        tokenizer: a folder whose tokenizer files go with the checkpoint; None leaves them out.
        mesh: axes and sizes, as in `expert=4,sequence=2`, or a YAML file; None means `data=-1`.
        cpu_devices: simulate so many devices on the CPU; None takes the devices that are there.
        seed: of the initial parameters and of the order of the data.
        dtype: of computation; the parameters being trained are float32.
        checkpoint_dtype: of the parameters in the finished checkpoint.
        router_loss: how much the load-balance loss counts beside the cross entropy.
        remat: recompute layers in the backward pass, to save memory.
        log_every, evaluate_every, save_every: in steps; 0 evaluates or saves only at the end.
    """

    model: dict
    data: DataConfig
    optimizer: OptimizerConfig
    output: str
    steps: int
    tokenizer: str | None = None
    mesh: str | None = None
    cpu_devices: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_dtype: Literal["float32", "bfloat16"] = "float32"
    router_loss: float = 0.01
    remat: bool = False
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0


def read_train_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file with the fields of `TrainConfig`.

    Raises:
        UserError: if the file cannot be read, or has an unknown key or a value of the wrong kind.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML: {reason}; correct it.") from None
    return from_mapping(TrainConfig, content, str(path))


def from_mapping(cls: type, content: Any, source: str) -> Any:
    """A dataclass from a mapping of its fields; dataclasses inside it likewise.

    Raises:
        UserError: for a key that is no field (naming the nearest one), a field that is missing, or
            a value of another type.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{source} holds no mapping; write lines such as 'steps: 1000'.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            near = get_close_matches(str(key), fields, n=1, cutoff=0)[0]
            raise UserError(f"{source} has the unknown key '{key}'; the nearest one is '{near}'.")
    for name, field in fields.items():
        if name not in content and field.default is dataclasses.MISSING:
            raise UserError(f"{source} lacks '{name}'; add it.")
    kinds = typing.get_type_hints(cls)
    return cls(**{key: _value(kinds[key], value, source, key) for key, value in content.items()})


def _value(kind: Any, value: Any, source: str, key: str) -> Any:
    """`value` as `kind`: a dataclass, a union, a Literal, or a plain type."""
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), value, f"{source}, {key}")
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        expected = " or ".join(typing.get_args(kind))
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind and not (kind in (int, float) and value < 0):
        return value
    else:
        expected = _EXPECTED[kind]
    raise UserError(f"{source} gives '{key}' the value {value!r}; expected {expected}.")


_EXPECTED = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number such as 0.001, 0 or more",
    int: "a whole number, 0 or more",
    str: "text",
}
