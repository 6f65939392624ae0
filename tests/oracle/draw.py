"""Random tiny Llama 4 configurations for comparing the model with transformers."""

from unittest import mock

import numpy as np

from tests import reference, tiny

ROUNDING = 2e-5  # fp32 router logits of two implementations differ by less


def draw(seed):
    """One configuration that transformers computes, with tokens for it.

    Where two router logits tie but for rounding, either expert is a right answer; weights and
    tokens are drawn again until no choice is that close.

    Args:
        seed: Any non-negative int; the draw follows from it.

    Returns:
        (config, tokens, info): a Hugging Face config dict; int32 tokens [batch, length] over at
        least 3 chunks; and a dict of `weights_seed` (for `tiny.random_tensors`), `decode_from`
        (tokens to prefill before decoding) and `router_gap`.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    config = draw_config(generator)
    chunk = config["attention_chunk_size"]
    length = int(generator.integers(3 * chunk + 1, 4 * chunk + 1))
    shape = (int(generator.integers(1, 4)), length)
    info = {"decode_from": int(generator.integers(1, length)), "router_gap": 0.0}
    while info["router_gap"] < ROUNDING:
        info["weights_seed"] = int(generator.integers(2**31))
        tokens = generator.integers(0, config["vocab_size"], shape, dtype=np.int32)
        tensors = tiny.random_tensors(config, info["weights_seed"])
        info["router_gap"] = router_gap(config, tensors, tokens)
    return config, tokens, info


def draw_config(generator):
    def pick(*options):
        return options[generator.integers(len(options))]

    layers, kv_heads, experts = pick(4, 5, 6, 7, 8, 9), pick(1, 2), pick(1, 2, 3, 4, 8, 16)
    config = pick(tiny.scout_like, tiny.maverick_like)(
        num_hidden_layers=layers,
        hidden_size=pick(48, 64, 80),
        num_attention_heads=kv_heads * pick(1, 2, 4, 5),
        num_key_value_heads=kv_heads,
        head_dim=pick(16, 18, 24, 32),
        num_local_experts=experts,
        num_experts_per_tok=min(experts, pick(1, 1, 2)),
        attention_chunk_size=int(generator.integers(5, 33)),
        floor_scale=pick(3, 4, 7, 10, 40),
        attn_scale=pick(0.1, 0.3),
        use_qk_norm=pick(True, False),
        attn_temperature_tuning=pick(True, True, False),
        rms_norm_eps=pick(1e-5, 1e-3),
        rope_theta=pick(10000.0, 500000.0),
    )
    return draw_rope(config, pick) | draw_layers(generator, pick, layers)


def draw_rope(config, pick):
    """No scaling, the hard threshold, or the smooth ramp; in the older or the newer spelling."""
    original = pick(16, 32, 64)
    scalings = [tiny.rope_scaling(*f, original) for f in ((16.0, 1.0, 1.0), (8.0, 1.0, 4.0))]
    scaling = pick(None, *scalings)
    if pick(True, False):
        return config | {"rope_scaling": scaling}
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    older = ("rope_theta", "rope_scaling")
    return {k: v for k, v in config.items() if k not in older} | {"rope_parameters": rope}


def draw_layers(generator, pick, layers):
    """Rules for the layers' kinds, or explicit lists of them."""
    kinds = {}
    if pick(True, False, False):
        kinds["no_rope_layers"] = [int(kind) for kind in generator.integers(0, 2, layers)]
    else:
        kinds["no_rope_layer_interval"] = pick(4, 4, 2, 3)
    if pick(True, False, False):
        kinds["moe_layers"] = [i for i in range(layers) if pick(True, False)]
    else:
        kinds["interleave_moe_layer_step"] = pick(1, 2)
    return kinds


def router_gap(config, tensors, tokens, first=0):
    """The smallest distance between a chosen and a passed-over router logit; inf without any.

    Only tokens from the position `first` on count.
    """
    gaps = [np.inf]
    route = reference.route

    def watched(router_logits, top_k):
        if top_k < router_logits.shape[-1]:
            ordered = np.sort(router_logits[:, first:], axis=-1)
            gaps.append((ordered[..., -top_k] - ordered[..., -top_k - 1]).min())
        return route(router_logits, top_k)

    with mock.patch.object(reference, "route", watched):
        reference.logits(config, tensors, tokens)
    return float(min(gaps))
