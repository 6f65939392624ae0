"""The same tiny model in every format that Llama 4 is published in, written out by hand.

Nothing of the name table is used: these are the rules that it is held against.
"""

import json

import ml_dtypes
import numpy as np

from tests import tiny
from tests.pth_files import EXTRA_STATE, save_pth

FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
VISION = tiny.PUBLISHED_VISION | {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,  # four times the width, as patches are shuffled by four
    "image_size": 8,
    "patch_size": 4,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
}


def random_vision(text_size, seed=9, dtype=np.float32):
    numbers = np.random.default_rng(seed)
    shapes = tiny.vision_shapes(VISION, text_size)
    return {name: numbers.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def multimodal(config, tensors, dtype=np.float32):
    """config.json and tensors of the model with a vision tower."""
    outer, text = tiny.nested(config, tensors)
    vision = random_vision(config["hidden_size"], dtype=dtype)
    return outer | {"vision_config": VISION}, text | vision


# compressed-tensors


def quantization_config(format, weights):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def unfused(config, tensors):
    """Linear weights [out, in] of each expert in place of the fused ones."""
    out = {}
    for name, w in tensors.items():
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for j, expert in enumerate(w):
                gate, up = np.split(expert, 2, axis=-1)
                out[f"{stem}.{j}.gate_proj.weight"] = np.ascontiguousarray(gate.T)
                out[f"{stem}.{j}.up_proj.weight"] = np.ascontiguousarray(up.T)
        elif name.endswith("experts.down_proj"):
            for j, expert in enumerate(w):
                out[f"{stem}.{j}.down_proj.weight"] = np.ascontiguousarray(expert.T)
        else:
            out[name] = w
    return out


def fused(config, tensors):
    """The inverse of `unfused`."""
    out = {name: w for name, w in tensors.items() if ".experts." not in name}
    for n in tiny.moe_layers(config):
        stem = f"model.layers.{n}.feed_forward.experts"

        def stack(part, stem=stem):
            experts = range(config["num_local_experts"])
            return np.stack([tensors[f"{stem}.{j}.{part}_proj.weight"].T for j in experts])

        out[f"{stem}.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=-1)
        out[f"{stem}.down_proj"] = stack("down")
    return {name: out[name] for name in tiny.tensor_shapes(config)}


def row_scaled(w, largest):
    """Scales [out, 1] in bfloat16, and weights divided by them."""
    w = w.astype(np.float32)
    scale = (abs(w).max(axis=1, keepdims=True) / largest).astype(BF16)
    return scale, w / scale.astype(np.float32)


def in_fp8(config, tensors):
    """Maverick's FP8 release: experts in e4m3 with a scale a row; and what it stands for."""
    stored, meant = {}, {}
    for name, w in unfused(config, tensors).items():
        meant[name] = stored[name] = w
        if ".experts." in name:
            scale, scaled = row_scaled(w, 448)
            stored[name], stored[f"{name}_scale"] = scaled.astype(FP8), scale
            meant[name] = stored[name].astype(np.float32) * scale.astype(np.float32)
    described = quantization_config("float-quantized", {"num_bits": 8, "type": "float"})
    return config | {"quantization_config": described}, stored, fused(config, meant)


def in_fp8_blocks(config, tensors, block=(48, 32)):
    """Every matrix of feed-forward layers in e4m3, a scale a block; and what it stands for.

    The last block of outputs is a part of one.
    """
    stored, meant = {}, {}
    for name, w in unfused(config, tensors).items():
        meant[name] = stored[name] = w
        if "_proj" not in name or "self_attn" in name:
            continue
        rows, columns = (-(-size // step) for size, step in zip(w.shape, block, strict=True))
        padded = np.zeros((rows * block[0], columns * block[1]), np.float32)
        padded[: w.shape[0], : w.shape[1]] = w
        largest = abs(padded.reshape(rows, block[0], columns, block[1])).max(axis=(1, 3))
        scale = (largest / 448).astype(BF16)
        each = np.repeat(np.repeat(scale, block[0], 0), block[1], 1).astype(np.float32)
        each = each[: w.shape[0], : w.shape[1]]
        stored[name], stored[f"{name}_scale"] = (w / each).astype(FP8), scale
        meant[name] = stored[name].astype(np.float32) * each
    kind = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(block)}
    described = quantization_config("float-quantized", kind)
    return config | {"quantization_config": described}, stored, fused(config, meant)


def in_fp8_tensors(config, tensors):
    """Experts in e4m3 with one scale a matrix, and scales of inputs, keys and values beside."""
    stored, meant = {}, {}
    for name, w in unfused(config, tensors).items():
        meant[name] = stored[name] = w
        if ".experts." in name:
            scale = np.array([abs(w).max() / 448], np.float32)
            stored[name], stored[f"{name}_scale"] = (w / scale).astype(FP8), scale
            stored[name.replace("weight", "input_scale")] = scale
            meant[name] = stored[name].astype(np.float32) * scale
    for n in range(config["num_hidden_layers"]):
        for x in "kv":
            stored[f"model.layers.{n}.self_attn.{x}_scale"] = np.ones(1, np.float32)
    kind = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    described = quantization_config("float-quantized", kind)
    return config | {"quantization_config": described}, stored, fused(config, meant)


def in_w4a16(config, tensors, width=32):
    """Every feed-forward matrix in groups of 4 bits, eight a word; and what it stands for."""
    stored, meant = {}, {}
    for name, w in unfused(config, tensors).items():
        meant[name] = w
        if "_proj" not in name or "self_attn" in name:
            stored[name] = w
            continue
        groups = w.astype(np.float32).reshape(len(w), -1, width)
        scale = (abs(groups).max(axis=-1, keepdims=True) / 7.5).astype(BF16)
        values = np.clip(np.round(groups / scale.astype(np.float32)), -8, 7) + 0.0  # no -0
        meant[name] = (values * scale.astype(np.float32)).reshape(w.shape)
        words = (values.reshape(len(w), -1, 8) + 8).astype(np.uint32)
        packed = (words << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
        stem = name.removesuffix(".weight")
        stored[f"{stem}.weight_packed"] = packed.view(np.int32)
        stored[f"{stem}.weight_scale"] = scale[..., 0]
        stored[f"{stem}.weight_shape"] = np.array(w.shape, np.int64)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": width}
    described = quantization_config("pack-quantized", weights)
    return config | {"quantization_config": described}, stored, fused(config, meant)


# Meta


def shares(x, axis, ranks):
    return np.split(x, ranks, axis=axis)


def stacked(parts, ranks):
    """Outputs of several Linears: each rank has some of each, one after the other."""
    split = [shares(part, 0, ranks) for part in parts]
    return [np.concatenate(rows) for rows in zip(*split, strict=True)]


def meta_layer(config, get, n, ranks):
    """Each tensor of a decoder layer as a list over ranks."""
    attention, ffn = f"layers.{n}.attention", f"layers.{n}.feed_forward"
    qkv = [get(f"self_attn.{x}_proj.weight") for x in "qkv"]
    norm = get("post_attention_layernorm.weight")
    found = {
        f"{attention}.wqkv.layer_norm_weight": [get("input_layernorm.weight")] * ranks,
        f"{attention}.wqkv.weight": stacked(qkv, ranks),
        f"{attention}.wo.weight": shares(get("self_attn.o_proj.weight"), 1, ranks),
        f"{attention}.wqkv._extra_state": [EXTRA_STATE] * ranks,
    }
    if n not in tiny.moe_layers(config):
        gate_up = [get(f"feed_forward.{x}_proj.weight") for x in ("gate", "up")]
        return found | {
            f"{ffn}.mlp.layer_norm_weight": [norm] * ranks,
            f"{ffn}.mlp.fc1_weight": stacked(gate_up, ranks),
            f"{ffn}.mlp.fc2_weight": shares(get("feed_forward.down_proj.weight"), 1, ranks),
        }
    shared = "feed_forward.shared_expert."
    gate, up = np.split(get("feed_forward.experts.gate_up_proj"), 2, axis=-1)
    experts = {
        "moe_w_in_eD_F": shares(gate, 2, ranks),
        "moe_w_swiglu_eD_F": shares(up, 2, ranks),
        "moe_w_out_eF_D": shares(get("feed_forward.experts.down_proj"), 1, ranks),
    }
    flat = {
        f"{ffn}.experts.{name}": [part.reshape(-1, part.shape[-1]) for part in parts]
        for name, parts in experts.items()
    }
    return (
        found
        | flat
        | {
            f"{ffn}.norm.weight": [norm] * ranks,
            f"{ffn}.router_DE": [get("feed_forward.router.weight").T.copy()] * ranks,
            f"{ffn}.w_in_shared_FD.weight": shares(get(f"{shared}gate_proj.weight"), 0, ranks),
            f"{ffn}.w_swiglu_FD.weight": shares(get(f"{shared}up_proj.weight"), 0, ranks),
            f"{ffn}.w_out_shared_DF.weight": shares(get(f"{shared}down_proj.weight"), 1, ranks),
            f"{ffn}.running_gate_stats_3E": [np.zeros((3, 8), np.float32)] * ranks,
        }
    )


def meta_vision(tensors, ranks):
    """The vision side over ranks."""
    eye = "vision_embeddings.vision_encoder."
    whole, columns, rows = {}, {}, {}
    for ours, theirs in (("layernorm_pre", "ln_pre"), ("layernorm_post", "ln_post")):
        for x in ("weight", "bias"):
            whole[f"{eye}{theirs}.{x}"] = f"vision_model.{ours}.{x}"
    for name in ("class_embedding", "positional_embedding_vlm"):
        whole[eye + name] = f"vision_model.{name}"
    columns[f"{eye}conv1._linear.weight"] = "vision_model.patch_embedding.linear.weight"
    for n in range(VISION["num_hidden_layers"]):
        block, layer = f"{eye}transformer.resblocks.{n}", f"vision_model.model.layers.{n}"
        norms = (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"))
        for theirs, ours in norms:
            for x in ("weight", "bias"):
                whole[f"{block}.{theirs}.{x}"] = f"{layer}.{ours}.{x}"
        split = [(f"attn.w{x}", f"self_attn.{x}_proj") for x in "qkv"] + [("mlp.c_fc", "mlp.fc1")]
        for theirs, ours in split:
            for x in ("weight", "bias"):
                columns[f"{block}.{theirs}.{x}"] = f"{layer}.{ours}.{x}"
        for theirs, ours in (("attn.wo", "self_attn.o_proj"), ("mlp.c_proj", "mlp.fc2")):
            rows[f"{block}.{theirs}.weight"] = f"{layer}.{ours}.weight"
            whole[f"{block}.{theirs}.bias"] = f"{layer}.{ours}.bias"
    adapter = "vision_embeddings.vision_adapter.mlp."
    columns[f"{adapter}c_fc.weight"] = "vision_model.vision_adapter.mlp.fc1.weight"
    rows[f"{adapter}c_proj.weight"] = "vision_model.vision_adapter.mlp.fc2.weight"
    columns["vision_projection.weight"] = "multi_modal_projector.linear_1.weight"
    return (
        {theirs: [tensors[ours]] * ranks for theirs, ours in whole.items()}
        | {theirs: shares(tensors[ours], 0, ranks) for theirs, ours in columns.items()}
        | {theirs: shares(tensors[ours], 1, ranks) for theirs, ours in rows.items()}
    )


def in_meta(config, tensors, ranks, vision=None):
    """Every tensor of Meta's files as a list over ranks."""
    found = {
        "tok_embeddings.weight": shares(tensors["model.embed_tokens.weight"], 0, ranks),
        "norm.weight": [tensors["model.norm.weight"]] * ranks,
        "output.weight": shares(tensors["lm_head.weight"], 0, ranks),
        "rope.freqs": [np.zeros(8, np.float32)] * ranks,
    }
    for n in range(config["num_hidden_layers"]):

        def get(name, n=n):
            return tensors[f"model.layers.{n}.{name}"]

        found |= meta_layer(config, get, n, ranks)
    return found | (meta_vision(vision, ranks) if vision else {})


def to_fp8_mixed(config, found, ranks):
    """Experts of all layers but the first and last in e4m3: the new tensors, and the scales.

    Scales are those of outputs, taken on each rank apart.
    """
    D, F, E = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    stored, scales = dict(found), {}
    names = {"w1": ("moe_w_in_eD_F", D), "w3": ("moe_w_swiglu_eD_F", D)}
    names["w2"] = ("moe_w_out_eF_D", F // ranks)
    for n in tiny.moe_layers(config):
        if n in (0, config["num_hidden_layers"] - 1):
            continue
        stem = f"layers.{n}.feed_forward.experts"
        for short, (name, inputs) in names.items():
            parts = [x.reshape(E, inputs, -1) for x in found[f"{stem}.{name}"]]
            each = [abs(x.astype(np.float32)).max(axis=1) / 448 for x in parts]
            scaled = [
                (x / scale[:, None]).astype(FP8) for x, scale in zip(parts, each, strict=True)
            ]
            stored[f"{stem}.{name}"] = [x.reshape(-1, x.shape[-1]) for x in scaled]
            scales[f"{stem}.{short}"] = each
    return stored, scales


def meta_params(config, vision=False):
    """params.json; expert and dense widths follow from the others as in Meta's code."""
    moe = {
        "num_experts": config["num_local_experts"],
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": config["num_experts_per_tok"],
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
    }
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "ffn_dim_multiplier": 0.75,  # 0.75 * 2 / 3 * 4 * dim = 2 dim, of which an expert has half
        "ffn_exp": 4.0,
        "multiple_of": 16,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": config["rope_scaling"] is not None,
        "use_qk_norm": config["use_qk_norm"],
        "floor_scale": config["floor_scale"],
        "attn_scale": config["attn_scale"],
        "attention_chunk_size": config["attention_chunk_size"],
        "nope_layer_interval": 4,
        "moe_args": moe,
    }
    if vision:
        size = {
            key: {"height": VISION[key], "width": VISION[key]}
            for key in ("image_size", "patch_size")
        }
        params["vision_args"] = size | {
            "dim": VISION["hidden_size"],
            "n_layers": VISION["num_hidden_layers"],
            "n_heads": VISION["num_attention_heads"],
            "mlp_ratio": VISION["intermediate_size"] / VISION["hidden_size"],
            "output_dim": 48,
            "pixel_shuffle_ratio": 0.5,
        }
    return params


def write_meta(folder, params, found, ranks, scales=None):
    """params.json, consolidated.NN.pth, and scales if there are some."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        mine = {name: parts[rank] for name, parts in found.items()}
        mine = {n: x if x is EXTRA_STATE else np.ascontiguousarray(x) for n, x in mine.items()}
        save_pth(folder / f"consolidated.{rank:02d}.pth", mine)
        if scales:
            save_pth(
                folder / f"fp8_scales_{rank}.pt",
                {name: np.ascontiguousarray(parts[rank]) for name, parts in scales.items()},
            )
    return folder
