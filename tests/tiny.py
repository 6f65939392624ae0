"""Tiny random Llama 4 checkpoints in the Hugging Face layout, and the golden files made from them.

Needs NumPy and safetensors only, so the oracle's environment can use it too. Weights follow from a
config and a seed; golden files keep a checksum of them instead of the weights.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"

PUBLISHED = {  # what Scout and Maverick share
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "vocab_size": 202048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attention_chunk_size": 8192,
    "no_rope_layers": [],
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "max_position_embeddings": 10485760,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "pad_token_id": 200018,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
    "for_llm_compressor": False,
}

PUBLISHED_VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 10000,
}

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 8,  # layers 3 and 7 are global
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_local_experts": 8,
    "vocab_size": 128,
    "rope_theta": 10000.0,  # of 8 frequencies, 3 still turn visibly within a chunk
    "attention_chunk_size": 16,
    "floor_scale": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 120,
    "eos_token_id": [121, 122, 123],
    "pad_token_id": 124,
}


def rope_scaling(factor=16.0, low=1.0, high=1.0, original=32):
    """Llama 3 frequency scaling; the default old context of 32 tokens keeps 2 frequencies of 8."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def hf_config(**overrides):
    """A tiny text-only config.json; `overrides` are Hugging Face keys."""
    return {**PUBLISHED, **TINY, **overrides}


def scout_like(**overrides):
    """Every layer MoE, QK norm, scaled frequencies."""
    return hf_config(**{"rope_scaling": rope_scaling(), **overrides})


def maverick_like(**overrides):
    """Dense and MoE layers in turn, no QK norm, unscaled frequencies."""
    return hf_config(**{"interleave_moe_layer_step": 2, "use_qk_norm": False, **overrides})


def published_scout():
    """The real Scout's text config; far too large to draw tensors for."""
    return {**PUBLISHED, "rope_scaling": rope_scaling(original=8192)}


def published_maverick():
    """The real Maverick's text config; far too large to draw tensors for."""
    changes = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    return {**PUBLISHED, **changes, "max_position_embeddings": 1048576}


def nested(config, tensors):
    """The same checkpoint as the multimodal releases spell it: `text_config`, `language_model.`"""
    text = {k: v for k, v in config.items() if k != "architectures"}
    outer = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": 125,
        "eoi_token_index": 126,
        "image_token_index": 127,
        "text_config": text,
    }
    return outer, {f"language_model.{name}": value for name, value in tensors.items()}


def vision_shapes(vision, text_size=5120):
    """Shape of every tensor of the vision side by its Hugging Face name."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["num_channels"] * vision["patch_size"] ** 2
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shuffled = round(width / vision["pixel_shuffle_ratio"] ** 2)
    adapter, out = vision["projector_input_dim"], vision["projector_output_dim"]
    shapes = {
        "vision_model.class_embedding": (width,),
        "vision_model.positional_embedding_vlm": (patches + 1, width),
        "vision_model.patch_embedding.linear.weight": (width, patch),
        "vision_model.vision_adapter.mlp.fc1.weight": (adapter, shuffled),
        "vision_model.vision_adapter.mlp.fc2.weight": (out, adapter),
        "multi_modal_projector.linear_1.weight": (text_size, vision["vision_output_dim"]),
    }
    norms = ["vision_model.layernorm_pre", "vision_model.layernorm_post"]
    for n in range(vision["num_hidden_layers"]):
        layer = f"vision_model.model.layers.{n}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        linears = {f"self_attn.{x}_proj": (width, width) for x in "qkvo"}
        linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
    return shapes | {f"{norm}.{x}": (width,) for norm in norms for x in ("weight", "bias")}


def moe_layers(config):
    step = config["interleave_moe_layer_step"]
    rule = range(step - 1, config["num_hidden_layers"], step)
    return rule if config.get("moe_layers") is None else config["moe_layers"]


def tensor_shapes(config):
    """Shape of every text tensor of a checkpoint by its Hugging Face name."""
    vocab, embed = config["vocab_size"], config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (vocab, embed)}
    for layer in range(config["num_hidden_layers"]):
        parts = attention_shapes(config)
        parts |= moe_shapes(config) if layer in moe_layers(config) else dense_shapes(config)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes | {"model.norm.weight": (embed,), "lm_head.weight": (vocab, embed)}


def attention_shapes(config):
    embed = config["hidden_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return {
        "input_layernorm.weight": (embed,),
        "self_attn.q_proj.weight": (q, embed),
        "self_attn.k_proj.weight": (kv, embed),
        "self_attn.v_proj.weight": (kv, embed),
        "self_attn.o_proj.weight": (embed, q),
        "post_attention_layernorm.weight": (embed,),
    }


def dense_shapes(config):
    return mlp_shapes("feed_forward", config["hidden_size"], config["intermediate_size_mlp"])


def moe_shapes(config):
    experts, embed = config["num_local_experts"], config["hidden_size"]
    hidden = config["intermediate_size"]
    return {
        "feed_forward.router.weight": (experts, embed),
        "feed_forward.experts.gate_up_proj": (experts, embed, 2 * hidden),
        "feed_forward.experts.down_proj": (experts, hidden, embed),
        **mlp_shapes("feed_forward.shared_expert", embed, hidden),
    }


def mlp_shapes(prefix, embed, hidden):
    return {
        f"{prefix}.gate_proj.weight": (hidden, embed),
        f"{prefix}.up_proj.weight": (hidden, embed),
        f"{prefix}.down_proj.weight": (embed, hidden),
    }


def random_tensors(config, seed, dtype=np.float32):
    """Random weights by Hugging Face name; logits and router logits have std near 1."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tensors = {
        name: random_tensor(generator, name, shape).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }
    if config["torch_dtype"] == "bfloat16" and dtype == np.float32:
        tensors = {name: upper_half(x) for name, x in tensors.items()}
    return tensors


def upper_half(x):
    """A float32 array without the bits that bfloat16 drops."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def random_tensor(generator, name, shape):
    noise = generator.standard_normal(shape)
    if len(shape) == 1:
        return 1 + 0.2 * noise  # norm weights: not all 1, so that a dropped one shows
    if "embed_tokens" in name:
        return noise
    inputs = shape[1]  # of Linear [out, in] and of fused experts [expert, in, out]
    return noise / np.sqrt(inputs)


def checksum(tensors):
    """SHA-256 over names and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def write_checkpoint(folder, config, tensors, shards=1):
    """Writes config.json and one safetensors file, or `shards` of them and their index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # as they are written
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i, names in enumerate(np.array_split(list(tensors), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({str(n): tensors[n] for n in names}, folder / file, {"format": "pt"})
        weight_map |= {str(n): file for n in names}
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


@dataclasses.dataclass(frozen=True)
class Golden:
    """What Hugging Face transformers computed in fp32 for one tiny model.

    Attributes:
        config: The model's config.json.
        seed: `random_tensors(config, seed)` gives its weights.
        checksum: `checksum` of those weights.
        tokens: int32 [batch, length].
        first_row: The first position whose logits are kept.
        logits: float32 [batch, length - first_row, vocab], one full forward pass.
        decode_from: Tokens prefilled before `decode_logits`; 0 where there are none.
        decode_logits: float32 [batch, length - decode_from, vocab], one token at a time.
        prompt: Tokens of the prompt that `greedy` continues; 0 where there is none.
        greedy: int32 [batch, new], the greedy continuation of tokens[:, :prompt].
    """

    config: dict
    seed: int
    checksum: str
    tokens: np.ndarray
    first_row: int
    logits: np.ndarray
    decode_from: int = 0
    decode_logits: np.ndarray | None = None
    prompt: int = 0
    greedy: np.ndarray | None = None

    def tensors(self):
        """The weights, float32.

        Raises:
            AssertionError: NumPy no longer draws the numbers that the golden file was made with.
        """
        tensors = random_tensors(self.config, self.seed)
        assert checksum(tensors) == self.checksum, "weights drifted: run scripts/make_golden.py"
        return tensors


def golden_names():
    """Those that are small enough for any path, the reference included."""
    return sorted(path.stem for path in GOLDEN.glob("*.npz"))


def read_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        stored = {key: file[key] if file[key].ndim else file[key].item() for key in file.files}
    return Golden(**{**stored, "config": json.loads(stored["config"])})


def write_golden(name, golden):
    fields = {k: v for k, v in vars(golden).items() if v is not None}
    (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN / f"{name}.npz", **{**fields, "config": json.dumps(golden.config)})
