"""Llama 4's text forward pass in NumPy float64: plain, slow, and the judge of the fast one.

It reads a Hugging Face config dict and Hugging Face tensor names and knows nothing of JAX. Left
padding, packing and far positions need no rule of their own: what a query sees and how it is
rotated or scaled follows from integer positions and segment ids alone.

Shapes: B rows, L tokens, H query heads, K key/value heads, d head size, D model size, E experts.
"""

import numpy as np


def logits(config, tensors, tokens, segment_ids=None, positions=None):
    """Next-token logits, float64 [B, L, vocab]; rows of segment 0 (padding) are zero.

    Positions restart in every segment unless int64 `positions` [B, L] are given.
    """
    config = config.get("text_config", config)
    tensors = {k.removeprefix("language_model."): v.astype(np.float64) for k, v in tensors.items()}
    segments = np.ones(np.shape(tokens), int) if segment_ids is None else np.asarray(segment_ids)
    *_, h = streams(config, tensors, tokens, segments, positions)
    h = rms_norm(h, config["rms_norm_eps"]) * tensors["model.norm.weight"]
    return (h @ tensors["lm_head.weight"].T) * (segments != 0)[..., None]


def streams(config, tensors, tokens, segments, positions=None):
    """The residual stream before each layer and after the last, float64 [B, L, D] each."""
    positions = segment_positions(segments) if positions is None else np.asarray(positions)
    h = tensors["model.embed_tokens.weight"][np.asarray(tokens)]
    yield h
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        x = rms_norm(h, config["rms_norm_eps"]) * w["input_layernorm.weight"]
        h = h + attention(config, w, is_local(config, layer), x, positions, segments)
        x = rms_norm(h, config["rms_norm_eps"]) * w["post_attention_layernorm.weight"]
        h = h + (moe(config, w, x) if is_moe(config, layer) else mlp(w, "feed_forward", x))
        yield h


def segment_positions(segments):
    """How many earlier tokens of the row belong to the same segment, [B, L]."""
    return np.tril(segments[:, :, None] == segments[:, None, :], -1).sum(-1)


def is_local(config, layer):
    """Local layers rotate, see one chunk and may normalise q and k; global layers do none of it."""
    if config.get("no_rope_layers"):
        return config["no_rope_layers"][layer] == 1  # despite the name, 1 means RoPE
    return (layer + 1) % config["no_rope_layer_interval"] != 0


def is_moe(config, layer):
    if config.get("moe_layers") is not None:
        return layer in config["moe_layers"]
    return (layer + 1) % config["interleave_moe_layer_step"] == 0


def rms_norm(x, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def attention(config, w, local, x, positions, segments):
    head_shape = (*x.shape[:2], -1, config["head_dim"])
    q, k, v = ((x @ w[f"self_attn.{n}_proj.weight"].T).reshape(head_shape) for n in "qkv")
    if local:
        q, k = (rotate(t, positions, frequencies(config)) for t in (q, k))
        if config["use_qk_norm"]:
            q, k = qk_norm(config, q), qk_norm(config, k)
    elif config.get("attn_temperature_tuning", True):
        q = q * temperature(config, positions)[:, :, None, None]
    out = softmax_attention(q, k, v, visible(config, local, positions, segments))
    return out.reshape(*x.shape[:2], -1) @ w["self_attn.o_proj.weight"].T


def qk_norm(config, x):
    """Weightless, over each head's own features."""
    return rms_norm(x, config["rms_norm_eps"])


def frequencies(config):
    """Radians a token for each pair of head features, [d / 2].

    Llama 3 scaling divides the frequencies whose wavelength exceeds the old context, keeps the
    fast ones, and interpolates between; with low == high there is nothing between.
    """
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}  # the newer spelling
    freqs = rope["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    if rope.get("rope_type", "default") == "default":
        return freqs
    turns = rope["original_max_position_embeddings"] * freqs / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = 1.0 * (turns >= low) if low == high else np.clip((turns - low) / (high - low), 0, 1)
    return freqs * (kept + (1 - kept) / rope["factor"])


def rotate(x, positions, freqs):
    """Turn the feature pairs (0, 1), (2, 3), ... of [B, L, heads, d] as complex numbers."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[:, :, None, None] * freqs)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def temperature(config, positions):
    """The factor on the queries of global layers."""
    return 1 + config["attn_scale"] * np.log1p((positions + 1) // config["floor_scale"])


def visible(config, local, positions, segments):
    """Whether query i sees key j, [B, L, L]: its segment's past; on local layers, of its chunk."""
    seen = segments[:, :, None] == segments[:, None, :]
    seen &= positions[:, :, None] >= positions[:, None, :]
    if local and config["attention_chunk_size"]:
        chunks = positions // config["attention_chunk_size"]
        seen &= chunks[:, :, None] == chunks[:, None, :]
    return seen


def softmax_attention(q, k, v, seen):
    """[B, L, H, d]; query head j reads key/value head j // (H / K)."""
    k, v = (np.repeat(t, q.shape[2] // t.shape[2], axis=2) for t in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def swiglu(x, gate, up, down):
    return (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down


def mlp(w, name, x):
    return swiglu(x, *(w[f"{name}.{n}_proj.weight"].T for n in ("gate", "up", "down")))


def moe(config, w, x):
    """The shared expert on x, plus each chosen expert on its score times x."""
    scores = route(x @ w["feed_forward.router.weight"].T, config["num_experts_per_tok"])
    experts = (routed(w, e, x, scores[..., e, None]) for e in range(scores.shape[-1]))
    return mlp(w, "feed_forward.shared_expert", x) + sum(experts)


def route(router_logits, top_k):
    """Scores [B, L, E]: sigmoids of the top k logits, zero elsewhere; the lower index wins ties."""
    chosen = np.argsort(-router_logits, axis=-1, kind="stable")[..., :top_k]
    scores = np.zeros_like(router_logits)
    np.put_along_axis(scores, chosen, 1, axis=-1)
    return scores / (1 + np.exp(-router_logits))


def routed(w, e, x, score):
    """Expert e on the scaled input: gate half first; zero gives exactly zero."""
    gate, up = np.split(w["feed_forward.experts.gate_up_proj"][e], 2, axis=-1)
    return swiglu(score * x, gate, up, w["feed_forward.experts.down_proj"][e])
