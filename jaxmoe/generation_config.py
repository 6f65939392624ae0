"""Reads a checkpoint's `generation_config.json`: stop tokens, and settings of sampling.

A key may be at the top level or in `text_config`; the top level takes precedence.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.parsing import read_json

FILE = "generation_config.json"

_SAMPLED = ("temperature", "top_p", "top_k", "min_p")
_GREEDY = ("repetition_penalty",)  # matters where the largest logit is taken, too

# Keys that would change the sampled tokens and are not supported, with the values that have no
# effect.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "num_beams": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


@dataclass(frozen=True)
class GenerationConfig:
    """A checkpoint's defaults for generation.

    Attributes:
        eos_token_ids: the tokens that end an answer.
        sampling: those of `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` that
            are given; greedy decoding is temperature 0.
        unsupported: the keys with an effect that is not supported.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()
    unsupported: tuple[str, ...] = ()


def read_generation_config(folder: str | Path) -> GenerationConfig:
    """Reads the file in a checkpoint folder; without a file, the configuration is empty.

    Raises:
        UserError: if the file is broken or a value has the wrong type.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return GenerationConfig()
    content = read_json(path)
    inner = content.get("text_config") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(inner, dict | None):
        raise UserError(f"{path} is no JSON object; download it again.")
    values = {
        key: value
        for mapping in (inner or {}, content)
        for key, value in mapping.items()
        if value is not None
    }
    unsupported = [
        key for key, none in _WITHOUT_EFFECT.items() if key in values and values[key] not in none
    ]
    return GenerationConfig(_ids(values, path), _sampling(values, path), tuple(unsupported))


def with_stop_ids(config: Llama4Config, folder: str | Path) -> Llama4Config:
    """The configuration with the stop tokens of a folder's `generation_config.json` added.

    Raises:
        UserError: as `read_generation_config`.
    """
    ids = (*config.eos_token_ids, *read_generation_config(folder).eos_token_ids)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))


def _ids(values: dict[str, Any], path: Path) -> tuple[int, ...]:
    """The stop tokens."""
    found = values.get("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    if not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in ids):
        raise UserError(
            f"{path} has eos_token_id {found!r:.80}, not one token id or a list of ids."
        )
    return tuple(ids)


def _sampling(values: dict[str, Any], path: Path) -> tuple[tuple[str, Any], ...]:
    """The settings of sampling, by name.

    If `do_sample` is true, temperature and top_p default to 1, as in transformers, and top_k to no
    limit, which is 0.
    """
    do_sample = values.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise UserError(f"{path} has do_sample {do_sample!r:.80}, not true or false.")
    given: dict[str, Any] = {"temperature": 1, "top_p": 1} if do_sample else {}
    keys = _GREEDY if do_sample is False else (*_SAMPLED, *_GREEDY)
    given |= {key: values[key] for key in keys if key in values}
    if do_sample is False:
        given["temperature"] = 0.0
    for key, value in given.items():
        is_count = key == "top_k"
        if type(value) is not int and (is_count or type(value) is not float):
            raise UserError(f"{path} has {key} {value!r:.80}, which is no such number.")
        given[key] = max(value, 0) if is_count else float(value)  # a top_k of -1 is no limit either
    return tuple(given.items())
