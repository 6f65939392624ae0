"""Reads Meta's `params.json` as the Hugging Face config.json of the same model."""

from collections.abc import Mapping
from typing import Any, NoReturn

from jaxmoe.errors import UserError

# The context lengths of the released instruction-tuned models, which params.json does not have, by
# whether rotary frequencies are scaled.
CONTEXT = {True: 10485760, False: 1048576}
DEFAULTS = {"multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0}


def to_hf_mapping(params: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config.json of a model, as `jaxmoe.hf_config.from_hf` reads it.

    Args:
        params: the parsed params.json.
        source: its file, for error messages.

    Raises:
        UserError: if a size is missing, or a value makes no sense.
    """
    params = params.get("model", params)
    if not isinstance(params, Mapping):
        _refuse(source, "model")
    needed = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "moe_args")
    for key in needed:
        if key not in params:
            _refuse(source, key)
    try:
        text = _text(DEFAULTS | dict(params))
        return _with_vision(text, params.get("vision_args"), source)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{source} has a value that makes no sense ({error!r:.200}); download it again."
        ) from None


def _text(args: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model."""
    moe = args["moe_args"]
    return {
        "model_type": "llama4_text",
        "hidden_size": args["dim"],
        "num_hidden_layers": args["n_layers"],
        "num_attention_heads": args["n_heads"],
        "num_key_value_heads": args["n_kv_heads"],
        "head_dim": args.get("head_dim") or args["dim"] // args["n_heads"],
        "vocab_size": args["vocab_size"],
        "intermediate_size": _expert_width(args, moe),
        "intermediate_size_mlp": _width(args, 4.0),
        "num_local_experts": moe["num_experts"],
        "num_experts_per_tok": moe.get("top_k", 1),
        "interleave_moe_layer_step": moe.get("interleave_moe_layer_step", 1),
        "max_position_embeddings": CONTEXT[_flag(args, "use_scaled_rope", False)],
        "rms_norm_eps": args["norm_eps"],
        "rope_theta": args["rope_theta"],
        "rope_scaling": _rope_scaling(args),
        # 0 or null: every layer has rotary embeddings
        "no_rope_layer_interval": args.get("nope_layer_interval", 4) or args["n_layers"] + 1,
        "attention_chunk_size": args.get("attention_chunk_size"),
        "use_qk_norm": _flag(args, "use_qk_norm", False),
        "attn_temperature_tuning": _flag(args, "attn_temperature_tuning", True),
        "floor_scale": _whole(args.get("floor_scale", 8192)),
        "attn_scale": args.get("attn_scale", 0.1),
    }


def _flag(args: Mapping[str, Any], key: str, default: bool) -> bool:
    value = args.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is neither true nor false")
    return default if value is None else value


def _whole(value: Any) -> Any:
    """A float without a fraction as an int; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _width(args: Mapping[str, Any], expansion: float, active: float = 1.0) -> int:
    """The hidden width of a SwiGLU layer, as Meta's code computes it.

    Every step rounds down, and the last one up to a multiple of `multiple_of`.

    Args:
        args: of the model.
        expansion: the hidden width over the model's, before the factor 2 / 3 of a SwiGLU.
        active: how many experts share the width.
    """
    width = int(2 * int(expansion * args["dim"]) / 3)
    width = int(int((args.get("ffn_dim_multiplier") or 1.0) * width) / active)
    return -(-width // args["multiple_of"]) * args["multiple_of"]


def _expert_width(args: Mapping[str, Any], moe: Mapping[str, Any]) -> int:
    """The hidden width of an expert: the active experts together are as wide as a dense layer."""
    active = moe.get("capacity_factor", 1.0) + 1 if _flag(moe, "auto_scale_F", True) else 1.0
    return _width(args, args.get("ffn_exp") or 4.0, active)


def _rope_scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not _flag(args, "use_scaled_rope", False):
        return None
    return {
        "rope_type": "llama3",
        "factor": args.get("rope_scaling_factor") or 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": args.get("rope_high_freq_factor") or 1.0,
        "original_max_position_embeddings": 8192,
    }


def _with_vision(text: dict[str, Any], vision: Mapping[str, Any] | None, source: str):
    """The config of the text model inside that of a multimodal one, if there is a vision tower."""
    if vision is None:
        return text
    for key in ("image_size", "patch_size", "dim", "n_layers", "n_heads", "output_dim"):
        if key not in vision:
            _refuse(source, f"vision_args.{key}")
    outer = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
    }
    tower = {
        "model_type": "llama4_vision_model",
        "hidden_size": vision["dim"],
        "num_hidden_layers": vision["n_layers"],
        "num_attention_heads": vision["n_heads"],
        "intermediate_size": int(vision.get("mlp_ratio", 4.0) * vision["dim"]),
        "num_channels": 3,
        "image_size": vision["image_size"]["height"],
        "patch_size": vision["patch_size"]["height"],
        "pixel_shuffle_ratio": vision.get("pixel_shuffle_ratio", 0.5),
        "projector_input_dim": vision["output_dim"],
        "projector_output_dim": vision["output_dim"],
        "vision_output_dim": vision["output_dim"],
    }
    return {**outer, "text_config": text, "vision_config": tower}


def _refuse(source: str, key: str) -> NoReturn:
    raise UserError(f"{source} lacks {key}; download it again, or put a config.json beside it.")
