"""`EagleConfig`: every number of an EAGLE-3 head, read from its published `config.json`.

A head is one decoder layer that guesses a model's next tokens from the model's own hidden states
(Li et al., arXiv 2503.01840).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxmoe.config import Llama4Config, RopeScaling, check_heads
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_object, rope_fields
from jaxmoe.hf_keys import IGNORED, Keys

STATES = 3  # hidden states of the target that a head reads of each token
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_READ = frozenset(
    """
    num_key_value_heads head_dim draft_vocab_size rms_norm_eps rope_theta rope_scaling
    rope_parameters norm_before_residual eagle_config max_position_embeddings
    target_hidden_size bos_token_id eos_token_id pad_token_id
    """.split()
).union(_SIZES, (LAYER_IDS, "num_hidden_layers"))
# What would make another network of it.
_FIXED = {
    "num_hidden_layers": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "tie_word_embeddings": (False,),
    "pretraining_tp": (1,),
    "num_aux_hidden_states": (STATES,),
    "logit_scale": (1, 1.0),
    "is_causal": (True,),
    "parallel_drafting": (False,),
    "fc_norm": (False,),
    "norm_output": (False,),
    "norm_before_fc": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "quantization_config": (),
}
# The same of `eagle_config`, in which ModelOpt writes what of its heads others do not have.
_FIXED_INNER = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (1,),
    "norm_before_fc": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """An EAGLE-3 head. Names are those of its `config.json`, but for `layer_ids`.

    Attributes:
        hidden_size: of the head and of its target, whose embeddings the head reads.
        vocab_size: the target's.
        draft_vocab_size: how many of the target's tokens the head can guess.
        layer_ids: the decoder layers whose inputs, the residual stream, the head reads; the
            target's number of layers stands for the output of its last.
        norm_before_residual: whether the residual is the hidden state after its norm.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_before_residual: bool = False

    def __post_init__(self):
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        if self.draft_vocab_size > self.vocab_size:
            raise UserError(
                f"draft_vocab_size={self.draft_vocab_size} is more than "
                f"vocab_size={self.vocab_size}."
            )
        if len(self.layer_ids) != STATES:
            raise UserError(f"layer ids {_listed(self.layer_ids)} are not {STATES}.")


def default_layer_ids(layers: int) -> tuple[int, ...]:
    """The layers whose inputs a head reads where nothing is said: 2, L/2 and L-3 of L layers."""
    return min(2, layers), layers // 2, max(0, layers - 3)


def parse_layer_ids(text: str) -> tuple[int, ...]:
    """The ids of `2,24,45`.

    Raises:
        UserError: if they are no three numbers.
    """
    parts = text.split(",")
    if len(parts) != STATES or not all(x.strip().isdecimal() for x in parts):
        raise UserError(f"layer ids {text!r:.80} are no {STATES} numbers; write 2,24,45.")
    return tuple(map(int, parts))


def check_layer_ids(layer_ids: Sequence[int], layers: int, source: str) -> None:
    """Raises a UserError unless they are three layers, or the end, of a target of `layers`."""
    if len(layer_ids) != STATES or not all(0 <= i <= layers for i in layer_ids):
        raise UserError(
            f"{source} names the layers {_listed(layer_ids)}; a target of {layers} layers has "
            f"{STATES} ids from 0 to {layers}."
        )


def check_stated(layer_ids: Sequence[int], layers: int) -> None:
    """Raises a UserError if a `config.json` cannot say which layers of `layers` a head reads."""
    if layer_ids != default_layer_ids(layers) and layer_ids[0] != 2:
        raise UserError(
            f"a head that reads the inputs of layers {_listed(layer_ids)} has no config.json that "
            "all readers understand alike; let the first be 2."
        )


def check_target(config: EagleConfig, target: Llama4Config, source: str) -> None:
    """Raises a UserError if a head's sizes are not those of a target."""
    for name in ("hidden_size", "vocab_size"):
        own, other = getattr(config, name), getattr(target, name)
        if own != other:
            raise UserError(
                f"{source} has {name} {own}, but its target has {other}; it is the head of another "
                "model."
            )
    check_layer_ids(config.layer_ids, target.num_hidden_layers, source)


def read_eagle_config(
    folder: str | Path, target: Llama4Config, layer_ids: Sequence[int] | None = None
) -> tuple[EagleConfig, str]:
    """The head of a folder's `config.json`, and how its layer ids were read, in a sentence.

    Args:
        folder: a published head's.
        target: the model that it drafts for.
        layer_ids: layers whose inputs the head reads, in place of those that the file names.

    Raises:
        UserError: for an unknown or missing key, a value that makes another network of the head,
            sizes that are not the target's, or layer ids that may mean either of two things.
    """
    return eagle_from_hf(
        read_object(folder, "config.json"), str(Path(folder) / "config.json"), target, layer_ids
    )


def eagle_from_hf(
    mapping: Mapping[str, Any],
    source: str,
    target: Llama4Config,
    layer_ids: Sequence[int] | None = None,
) -> tuple[EagleConfig, str]:
    """As `read_eagle_config`, of a parsed file that messages call `source`."""
    keys = Keys(mapping, source)
    architectures = mapping.get("architectures")
    if not isinstance(architectures, list) or not set(ARCHITECTURES) & set(map(str, architectures)):
        keys.refuse("architectures", f"an EAGLE-3 head, {' or '.join(ARCHITECTURES)}")
    inner = _inner(keys)
    _check(keys, _FIXED, _READ | _FIXED.keys() | IGNORED)
    _check(inner, _FIXED_INNER, _FIXED_INNER.keys() | {LAYER_IDS})
    if mapping.get("target_hidden_size") not in (None, mapping.get("hidden_size")):
        keys.refuse("target_hidden_size", "that of hidden_size")
    layers = target.num_hidden_layers
    if layer_ids is None:
        found, note = _layer_ids(inner if LAYER_IDS in inner else keys, layers)
    else:
        found, note = tuple(layer_ids), f"reads the inputs of layers {_listed(layer_ids)} as asked"
    config = _config(keys, found)
    check_target(config, target, source)
    return config, note


def _inner(keys: Keys) -> Keys:
    """The keys of `eagle_config`; none if it is missing."""
    inner = keys.mapping.get("eagle_config") or {}
    if not isinstance(inner, Mapping):
        keys.refuse("eagle_config", "an object or null")
    return Keys(inner, f"{keys.source}, eagle_config")


def _check(keys: Keys, fixed: Mapping[str, tuple], known: frozenset[str] | set[str]) -> None:
    """Refuses values that are not supported, and keys that are not known.

    A key of `_FIXED` without values has none but null.
    """
    for key, allowed in fixed.items():
        if key in keys and not allowed:
            keys.refuse(key, "null: such heads are not supported")
    keys.check_fixed(fixed)
    for key in keys.mapping:
        if key in keys and key not in known:
            near = get_close_matches(key[:80], known, 1, 0)[0]
            raise UserError(
                f"{keys.source} has the key {key!r:.80}, which is not known of a head (the nearest "
                f"known one is {near!r}); remove it if the head does not depend on it."
            )


def _layer_ids(keys: Keys, layers: int) -> tuple[tuple[int, ...], str]:
    """The layers whose inputs a head reads, and a sentence about it.

    Two conventions are in use: ids of layers whose outputs are read, of which the first is 1, and
    of layers whose inputs are read, of which it is 2.
    """
    default = default_layer_ids(layers)
    if LAYER_IDS not in keys:
        return default, f"names no layers, so it reads the inputs of {_listed(default)}"
    stated = tuple(keys.integers(LAYER_IDS, range(layers + 1)))
    if len(stated) != STATES:
        keys.refuse(LAYER_IDS, f"{STATES} ids")
    if stated == default or stated[0] == 2:
        return stated, f"names the layers {_listed(stated)}, whose inputs it reads"
    if stated[0] == 1:
        found = tuple(i + 1 for i in stated)
        inputs = f"the inputs of {_listed(found)}"
        return found, f"names the layers {_listed(stated)}, whose outputs it reads: {inputs}"
    raise UserError(
        f"{keys.source} names the layers {_listed(stated)}, and does not say whether their inputs "
        f"or their outputs are read: give --layer-ids {_listed(stated)} for inputs or --layer-ids "
        f"{_listed([i + 1 for i in stated])} for outputs, and see which evaluate drafts accepts."
    )


def _listed(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))


def _config(keys: Keys, layer_ids: tuple[int, ...]) -> EagleConfig:
    sizes: dict[str, Any] = {name: keys.integer(name) for name in _SIZES}
    heads = sizes["num_attention_heads"]
    try:
        return EagleConfig(
            **sizes,
            num_key_value_heads=keys.integer("num_key_value_heads", heads),
            head_dim=keys.integer("head_dim", sizes["hidden_size"] // heads),
            draft_vocab_size=keys.integer("draft_vocab_size", sizes["vocab_size"]),
            layer_ids=layer_ids,
            rms_norm_eps=keys.number("rms_norm_eps", EagleConfig.rms_norm_eps),
            **rope_fields(keys, EagleConfig.rope_theta),
            norm_before_residual=keys.flag("norm_before_residual", False),
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if keys.source in message else f"{keys.source}: {error}") from None


def eagle_to_hf(config: EagleConfig, layers: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a head, which SGLang and vLLM read too.

    Args:
        config: of the head.
        layers: of its target. Layer ids are written only where they are not the default, since
            readers understand them in two ways.
        dtype: of its tensors.
    """
    scaling = config.rope_scaling
    check_stated(config.layer_ids, layers)
    ids = {} if config.layer_ids == default_layer_ids(layers) else {LAYER_IDS: config.layer_ids}
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llama",
        **{name: getattr(config, name) for name in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "draft_vocab_size": config.draft_vocab_size,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        **({"norm_before_residual": True} if config.norm_before_residual else {}),
        **{key: list(value) for key, value in ids.items()},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
