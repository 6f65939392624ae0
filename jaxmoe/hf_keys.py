"""The known keys of a Hugging Face `config.json`, their allowed values, and a reader of them."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxmoe.errors import UserError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
ROPE_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")

# The largest integers that are accepted: some ten times those of any model, so that nothing is
# allocated for a typing error. Ids of tokens and positions are int32.
LARGEST = {
    "hidden_size": 2**18,
    "intermediate_size": 2**22,
    "intermediate_size_mlp": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "num_hidden_layers": 2**12,
    "num_local_experts": 2**16,
}
LARGEST_OTHER = 2**31 - 1
RANGES = {  # of numbers that are no integers
    "rope_theta": (1, 1e12),
    "rms_norm_eps": (1e-20, 0.1),
    "attn_scale": (1e-9, 1e3),
    "pixel_shuffle_ratio": (1e-2, 1),
    **dict.fromkeys(ROPE_FACTORS, (1e-3, 1e6)),
}

# Keys that determine what the text model computes.
TEXT_KEYS = frozenset(
    """
    num_hidden_layers num_local_experts num_experts_per_tok interleave_moe_layer_step moe_layers
    no_rope_layers no_rope_layer_interval layer_types attention_chunk_size rope_theta
    rope_scaling rope_parameters use_qk_norm attn_temperature_tuning floor_scale attn_scale
    rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id
    """.split()
).union(SIZES)

# Keys that would change the model if they had another value.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "per_layer_config": (None,),
}

# The same for the vision tower.
VISION_FIXED = {
    "hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
    "multi_modal_projector_bias": (False,),
}

IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index")  # both are in use; the first is newer

# Keys without effect on the text model's forward pass: those for training and the vision tower, and
# those that transformers writes into every config (its bookkeeping and generation defaults).
IGNORED = frozenset(
    """
    attention_dropout router_aux_loss_coef router_jitter_noise output_router_logits
    initializer_range use_cache for_llm_compressor cache_implementation

    quantization_config vision_config boi_token_index eoi_token_index image_token_index
    boi_token_id eoi_token_id image_token_id

    architectures model_type transformers_version dtype torch_dtype name_or_path _name_or_path
    _commit_hash attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation unsloth_fixed unsloth_version auto_map tokenizer_class
    return_dict output_hidden_states output_attentions output_scores return_dict_in_generate
    torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder tie_last_hidden_states id2label label2id num_labels problem_type
    finetuning_task task_specific_params prefix sep_token_id decoder_start_token_id

    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens
    """.split()
)

KNOWN = TEXT_KEYS | FIXED.keys() | IGNORED | {"text_config"}


class Keys:
    """Reads a JSON object key by key; error messages name the file, the key and its value."""

    def __init__(self, mapping: Mapping[str, Any], source: str):
        self.mapping = mapping
        self.source = source

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.mapping.get(key) is not None

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raises a UserError: a key is missing, or has another value than expected."""
        if key not in self.mapping:
            raise UserError(f"{self.source} lacks {key}; add it: {expected}.")
        value = json.dumps(self.mapping[key], default=str)
        raise UserError(f"{self.source} gives {key} the value {value:.80}; expected {expected}.")

    def unknown(self) -> list[str]:
        """The unknown keys whose value is not null."""
        return [key for key in self.mapping if key in self and key not in KNOWN]

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]] = FIXED) -> None:
        """Checks keys that have only some values, by default those in `FIXED`.

        Raises:
            UserError: if one has another value.
        """
        for key, allowed in fixed.items():
            if key in self and not any(_is(self.mapping[key], value) for value in allowed):
                self.refuse(key, " or ".join(json.dumps(value) for value in allowed))

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer from `minimum` to the key's number in `LARGEST`.

        Raises:
            UserError: if the value is none; or it is missing and there is no default.
        """
        value = default if key not in self else self.mapping[key]
        most = LARGEST.get(key, LARGEST_OTHER)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= most:
            self.refuse(key, f"an integer from {minimum} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number in the key's range in `RANGES`.

        Raises:
            UserError: if the value is none; or it is missing and there is no default.
        """
        value = default if key not in self else self.mapping[key]
        least, most = RANGES[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            self.refuse(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool, also: tuple[int, ...] = ()) -> bool:
        """A boolean.

        Args:
            key: the key.
            default: its value if it is missing.
            also: numbers that some configs have instead, which count as `bool(number)`.

        Raises:
            UserError: if the value is none.
        """
        value = default if key not in self else self.mapping[key]
        if type(value) is not bool and not any(_is(value, number) for number in also):
            self.refuse(key, "true or false")
        return bool(value)

    def integers(self, key: str, allowed: range) -> list[int]:
        """A list of integers in `allowed`; the key must be there.

        Raises:
            UserError: if the value is none.
        """
        value = self.mapping[key]
        expected = f"a list of integers from {allowed[0]} to {allowed[-1]}"
        if not isinstance(value, list):
            self.refuse(key, expected)
        if any(type(item) is not int or item not in allowed for item in value):
            self.refuse(key, expected)
        return value


def _is(value: Any, expected: Any) -> bool:
    """Whether two values are the same in JSON, where 1 is not `true`."""
    return type(value) is type(expected) and value == expected
