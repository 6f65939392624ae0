"""Converts between Hugging Face's `config.json` and `Llama4Config`.

Every spelling that Llama 4 checkpoints use is read, and nothing is guessed: sizes must be given,
and unknown keys are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jaxmoe.config import (
    Attention,
    FeedForward,
    LayerKind,
    Llama4Config,
    RopeScaling,
    VisionConfig,
    layer_kinds,
)
from jaxmoe.errors import UserError
from jaxmoe.hf_keys import (
    IMAGE_TOKEN_KEYS,
    KNOWN,
    ROPE_FACTORS,
    SIZES,
    TEXT_KEYS,
    VISION_FIXED,
    Keys,
)
from jaxmoe.parsing import read_json

ATTENTION_NAMES: dict[str, Attention] = {"chunked_attention": "local", "full_attention": "global"}
MAX_NAMED = 10  # unknown keys in one error message

TEXT_MODEL, NESTED_MODEL = "llama4_text", "llama4"


def read_config(folder: str | Path) -> Llama4Config:
    """The configuration of a Hugging Face checkpoint folder.

    Raises:
        UserError: if `config.json` is missing or not JSON, or as `from_hf`.
    """
    return from_hf(read_object(folder, "config.json"), source=str(Path(folder) / "config.json"))


def read_object(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of a model's folder.

    Raises:
        UserError: if the file is missing or holds no JSON object.
    """
    path = Path(folder) / name
    mapping = read_json(path)
    if not isinstance(mapping, dict):
        raise UserError(f"{path} holds no JSON object; download it again.")
    return mapping


def from_hf(
    mapping: Mapping[str, Any], source: str, ignore_unknown: bool = False, text_only: bool = False
) -> Llama4Config:
    """Reads a `config.json`, text-only or with the text model nested in `text_config`.

    Accepts the keys of transformers 4.x (`rope_scaling`, `torch_dtype`) and 5.x (`rope_parameters`,
    `dtype`, `layer_types`). Lists of layers take precedence over the rules that would generate
    them. A key whose value is null counts as missing.

    Args:
        mapping: the parsed JSON.
        source: what error messages call it, usually the file's path.
        ignore_unknown: ignores unknown keys instead of refusing them.
        text_only: ignores `vision_config`.

    Raises:
        UserError: for an unknown or missing key, a value out of range, or keys that contradict each
            other.
    """
    outer = Keys(mapping, source)
    if mapping.get("model_type") not in (TEXT_MODEL, NESTED_MODEL):
        outer.refuse("model_type", f"one of '{TEXT_MODEL}' and '{NESTED_MODEL}'")
    text, unknown = outer, outer.unknown()
    if "text_config" in mapping:
        if not isinstance(mapping["text_config"], Mapping):
            outer.refuse("text_config", "an object")
        text = Keys(mapping["text_config"], f"{source}, text_config")
        outer.check_fixed()
        unknown += text.unknown()
    if unknown and not ignore_unknown:
        _refuse_unknown(source, unknown)
    text.check_fixed()
    config = _text_config(text)
    if text is outer:
        return config
    if not text_only:
        config = with_vision(config, mapping, source)
    if outer.mapping.get("eos_token_id") is None:
        return config
    ids = (*config.eos_token_ids, *_eos_ids(outer))
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))


def with_vision(config: Llama4Config, outer: Mapping[str, Any], source: str) -> Llama4Config:
    """The configuration of a text model with the vision tower that the JSON around it describes.

    Raises:
        UserError: if a size is missing, not a number, or does not fit the others.
    """
    keys = Keys(outer, source)
    named = [key for key in IMAGE_TOKEN_KEYS if key in keys]
    token = keys.integer(named[0], minimum=0) if named else config.image_token_id
    return dataclasses.replace(config, vision=_vision(outer, source), image_token_id=token)


def _refuse_unknown(source: str, unknown: list[str]) -> NoReturn:
    named = [
        f"{key!r:.80} (the nearest known one is {get_close_matches(key[:80], KNOWN, 1, 0)[0]!r})"
        for key in unknown[:MAX_NAMED]
    ]
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    raise UserError(
        f"{source} has keys that are not known: {', '.join(named)}{more}; if the model does not "
        "depend on them, remove them or convert it with --ignore-unknown-config."
    )


def stated_dtype(mapping: Mapping[str, Any]) -> Any:
    """The dtype that a `config.json` states, preferably for its text model; None if it does not."""
    text = mapping.get("text_config")
    for found in (text if isinstance(text, Mapping) else {}, mapping):
        for key in ("dtype", "torch_dtype"):
            if found.get(key) is not None:
                return found[key]
    return None


def _vision(outer: Mapping[str, Any], source: str) -> VisionConfig | None:
    """The sizes of the vision tower; None if no tower is described."""
    if not isinstance(outer.get("vision_config"), Mapping):
        return None
    keys = Keys(outer["vision_config"], f"{source}, vision_config")
    keys.check_fixed(VISION_FIXED)
    sizes: dict[str, Any] = {key: keys.integer(key) for key in _vision_sizes()}
    sizes["pixel_shuffle_ratio"] = keys.number("pixel_shuffle_ratio")
    sizes["rope_theta"] = rope_fields(keys, VisionConfig.rope_theta)["rope_theta"]
    try:
        return VisionConfig(**sizes)
    except UserError as error:
        raise UserError(f"{keys.source}: {error}") from None


def _vision_sizes() -> list[str]:
    """The names of the vision tower's sizes that are integers."""
    return [field.name for field in dataclasses.fields(VisionConfig) if field.type is int]


def outer_to_hf(config: Llama4Config) -> dict[str, Any] | None:
    """What stands around a text model's `config.json`; None without a vision tower."""
    if config.vision is None:
        return None
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": NESTED_MODEL,
        "image_token_index": config.image_token_id,
        "vision_config": {
            "model_type": "llama4_vision_model",
            **dataclasses.asdict(config.vision),
            "hidden_act": "gelu",
            "multi_modal_projector_bias": False,
        },
    }


def nest(text: dict[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a multimodal model.

    Args:
        text: the text model's, as `to_hf` makes it.
        outer: everything else.
    """
    text = {key: value for key, value in text.items() if key != "architectures"}
    return {**outer, "text_config": text}


def to_hf(config: Llama4Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a text model, as transformers 4.51 and later, including 5.x, reads it.

    Args:
        config: any configuration.
        dtype: the name of the weights' dtype, such as `bfloat16`.

    Raises:
        UserError: for a layer whose attention is neither local nor global.
    """
    copied = TEXT_KEYS & set(Llama4Config.__dataclass_fields__) - {"rope_scaling"}
    scaling = config.rope_scaling
    types = [_layer_type(i, kind) for i, kind in enumerate(config.layers)]
    nope = [kind.attention == "global" for kind in config.layers]
    moe = [kind.feed_forward == "moe" for kind in config.layers]
    intervals = {  # in addition to the lists, for readers that only know the rules
        "no_rope_layer_interval": _interval(nope),
        "interleave_moe_layer_step": _interval(moe),
    }
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": TEXT_MODEL,
        **{key: getattr(config, key) for key in sorted(copied)},
        "num_hidden_layers": config.num_hidden_layers,
        **{key: interval for key, interval in intervals.items() if interval},
        "no_rope_layers": [int(not flag) for flag in nope],  # 1: the layer is rotary
        "layer_types": types,
        "moe_layers": [i for i, flag in enumerate(moe) if flag],
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        "eos_token_id": list(config.eos_token_ids),
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": dtype,
    }


def _layer_type(index: int, kind: LayerKind) -> str:
    for name, attention in ATTENTION_NAMES.items():
        if kind.attention == attention:
            return name
    raise UserError(
        f"layer {index} has the attention {kind.attention}, for which config.json has no name; "
        "write the model with its layers 'local' or 'global'."
    )


def _interval(flags: list[bool]) -> int | None:
    """The n for which exactly every n-th flag is set; None if there is no such n."""
    first = [*flags, True].index(True) + 1
    regular = [(i + 1) % first == 0 for i in range(len(flags))]
    return first if flags == regular else None


def _text_config(keys: Keys) -> Llama4Config:
    """The configuration of a text model."""
    layers = _layers(keys)
    has_moe = any(kind.feed_forward == "moe" for kind in layers)
    fields: dict[str, Any] = dict(
        **{key: keys.integer(key) for key in SIZES},
        num_local_experts=keys.integer("num_local_experts", minimum=int(has_moe)),
        num_experts_per_tok=max(1, keys.integer("num_experts_per_tok", 1, minimum=int(has_moe))),
        layers=layers,
        attention_chunk_size=_chunk(keys),
        **rope_fields(keys, Llama4Config.rope_theta),
        use_qk_norm=keys.flag("use_qk_norm", True),
        attn_temperature_tuning=keys.flag("attn_temperature_tuning", True, also=(0, 1, 4)),
        floor_scale=keys.integer("floor_scale", Llama4Config.floor_scale),
        attn_scale=keys.number("attn_scale", Llama4Config.attn_scale),
        rms_norm_eps=keys.number("rms_norm_eps", Llama4Config.rms_norm_eps),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        **_token_ids(keys),
    )
    try:
        return Llama4Config(**fields)
    except UserError as error:
        raise UserError(f"{keys.source}: {error}") from None


def _chunk(keys: Keys) -> int | None:
    """The attention chunk size, by default 8192; None, for null, is attention without chunks."""
    if keys.mapping.get("attention_chunk_size", ...) is None:
        return None
    return keys.integer("attention_chunk_size", Llama4Config.attention_chunk_size)


def _layers(keys: Keys) -> tuple[LayerKind, ...]:
    """The kind of each layer, by the lists if they are given, else by Llama 4's rules."""
    count = keys.integer("num_hidden_layers")
    step = keys.integer("interleave_moe_layer_step", 1, minimum=0) or count + 1  # 0: all dense
    rule = layer_kinds(count, keys.integer("no_rope_layer_interval", 4), step)
    attention = _attention_kinds(keys, count) or [kind.attention for kind in rule]
    feed_forward: list[FeedForward] = [kind.feed_forward for kind in rule]
    if "moe_layers" in keys:
        moe = set(keys.integers("moe_layers", range(count)))
        feed_forward = ["moe" if i in moe else "dense" for i in range(count)]
    return tuple(LayerKind(a, f) for a, f in zip(attention, feed_forward, strict=True))


def _attention_kinds(keys: Keys, count: int) -> list[Attention] | None:
    """The attention of each layer by `no_rope_layers` or `layer_types`; None if both are missing.

    In `no_rope_layers`, 1 is a layer with rotary embeddings, which is a local one.
    """
    by_rope: list[Attention] | None = None
    by_type: list[Attention] | None = None
    if keys.mapping.get("no_rope_layers"):
        flags = keys.integers("no_rope_layers", range(2))
        if len(flags) < count:
            keys.refuse("no_rope_layers", f"an entry for each of the {count} layers")
        by_rope = ["local" if flag else "global" for flag in flags[:count]]
    if "layer_types" in keys:
        types = keys.mapping["layer_types"]
        expected = f"{count} of {' or '.join(ATTENTION_NAMES)}"
        if not isinstance(types, list) or len(types) != count:
            keys.refuse("layer_types", expected)
        if any(name not in list(ATTENTION_NAMES) for name in types):
            keys.refuse("layer_types", expected)
        by_type = [ATTENTION_NAMES[name] for name in types]
    if by_rope and by_type and by_rope != by_type:
        keys.refuse("layer_types", "chunked_attention exactly where no_rope_layers has 1")
    return by_rope or by_type


def rope_fields(keys: Keys, theta: float) -> dict[str, Any]:
    """The fields `rope_theta` and `rope_scaling`, by the keys of transformers 4.x or 5.x.

    Args:
        keys: of a `config.json`.
        theta: where none is given.

    Raises:
        UserError: for a value that is not known.
    """
    if "rope_scaling" in keys and "rope_parameters" in keys:
        keys.refuse("rope_scaling", "null beside rope_parameters")
    name = "rope_parameters" if "rope_parameters" in keys else "rope_scaling"
    if name not in keys:
        return {"rope_theta": keys.number("rope_theta", theta)}
    if not isinstance(keys.mapping[name], Mapping):
        keys.refuse(name, "an object or null")
    rope = Keys(keys.mapping[name], f"{keys.source}, {name}")
    theta = (rope if "rope_theta" in rope else keys).number("rope_theta", theta)
    return {"rope_theta": theta, "rope_scaling": _rope_scaling(rope)}


def _rope_scaling(rope: Keys) -> RopeScaling | None:
    if {key for key in rope.mapping if key in rope} <= {"rope_theta"}:
        return None
    kind = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    known = {"type", "rope_type", "rope_theta", "original_max_position_embeddings", *ROPE_FACTORS}
    for key in rope.mapping:
        if key in rope and key not in known:
            rope.refuse(key, f"no key but {', '.join(sorted(known))}")
    if rope.mapping.get(kind) == "default":
        return None
    if rope.mapping.get(kind) != "llama3":
        rope.refuse(kind, "'llama3' or 'default'")
    factors = {key: rope.number(key) for key in ROPE_FACTORS}
    if factors["low_freq_factor"] > factors["high_freq_factor"]:
        rope.refuse("low_freq_factor", "at most high_freq_factor")
    original = rope.integer("original_max_position_embeddings")
    return RopeScaling(**factors, original_max_position_embeddings=original)


def _token_ids(keys: Keys) -> dict[str, Any]:
    """The fields with ids of special tokens; missing ones are left to `Llama4Config`'s defaults.

    The padding token defaults to 0 if Llama 4's is outside the vocabulary.
    """
    ids: dict[str, Any] = {}
    if "bos_token_id" in keys:
        ids["bos_token_id"] = keys.integer("bos_token_id", minimum=0)
    if "eos_token_id" in keys:
        ids["eos_token_ids"] = _eos_ids(keys)
    fallback = Llama4Config.pad_token_id
    if fallback >= keys.mapping["vocab_size"]:
        fallback = 0  # padding is masked out, so any row of the embedding will do
    pad = keys.mapping.get("pad_token_id")
    ids["pad_token_id"] = fallback if pad in (None, -1) else keys.integer("pad_token_id", minimum=0)
    return ids


def _eos_ids(keys: Keys) -> tuple[int, ...]:
    if isinstance(keys.mapping["eos_token_id"], list):
        return tuple(keys.integers("eos_token_id", range(2**31)))
    return (keys.integer("eos_token_id", minimum=0),)
