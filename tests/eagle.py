"""A tiny random EAGLE-3 head in the published layout, and its passes in NumPy, one token at a time.

Like `tests.reference` it is float64, plain and slow, and knows nothing of JAX: keys are a list.
"""

import numpy as np

from tests.reference import rms_norm, swiglu

TINY_HEAD = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "vocab_size": 128,
    "draft_vocab_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def head_config(**overrides):
    return {**TINY_HEAD, **overrides}


def head_tensors(config, seed, layer="midlayer"):
    """Random float32 tensors by their published names; `layer` is what some call `layers.0`."""
    rng = np.random.default_rng(seed)
    D, F = config["hidden_size"], config["intermediate_size"]
    d = config.get("head_dim", D // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {
        "fc.weight": (D, 3 * D),
        f"{layer}.self_attn.q_proj.weight": (q, 2 * D),
        f"{layer}.self_attn.k_proj.weight": (kv, 2 * D),
        f"{layer}.self_attn.v_proj.weight": (kv, 2 * D),
        f"{layer}.self_attn.o_proj.weight": (D, q),
        f"{layer}.mlp.gate_proj.weight": (F, D),
        f"{layer}.mlp.up_proj.weight": (F, D),
        f"{layer}.mlp.down_proj.weight": (D, F),
        "lm_head.weight": (config["draft_vocab_size"], D),
    }
    tensors = {name: rng.normal(size=s) * s[-1] ** -0.5 for name, s in shapes.items()}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    for name in (*(f"{layer}.{norm}.weight" for norm in norms), "norm.weight"):
        tensors[name] = 1 + 0.2 * rng.normal(size=D)
    ids = np.sort(rng.permutation(config["vocab_size"])[: config["draft_vocab_size"]])
    found = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    found["d2t"] = (ids - np.arange(len(ids))).astype(np.int64)
    found["t2d"] = np.isin(np.arange(config["vocab_size"]), ids)
    return found


def plain_params(config, tensors, layer="midlayer"):
    """The tensors as `jaxmoe.model.eagle.eagle_specs` lays them out."""
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    w = {name: tensors[f"{layer}.self_attn.{name}_proj.weight"].T for name in "qkvo"}
    inputs = 2 * config["hidden_size"]
    mlp = {name: tensors[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    return {
        "fc": tensors["fc.weight"].T,
        "embed_norm": tensors[f"{layer}.input_layernorm.weight"],
        "hidden_norm": tensors[f"{layer}.hidden_norm.weight"],
        "attention": {
            "q": w["q"].reshape(inputs, H, -1),
            "k": w["k"].reshape(inputs, K, -1),
            "v": w["v"].reshape(inputs, K, -1),
            "o": w["o"].reshape(H, -1, config["hidden_size"]),
        },
        "feed_forward_norm": tensors[f"{layer}.post_attention_layernorm.weight"],
        "feed_forward": mlp,
        "norm": tensors["norm.weight"],
        "lm_head": tensors["lm_head.weight"].T,
    }


def target_ids(tensors):
    """The target's id of each token of the draft vocabulary."""
    return np.arange(len(tensors["d2t"])) + tensors["d2t"]


class Head:
    """A head that reads one sequence; `keys` are those of the passes so far."""

    def __init__(self, config, tensors, table):
        self.config, self.table = config, table.astype(np.float64)
        wide = {name: x.astype(np.float64) for name, x in tensors.items()}
        self.w = {name.replace("layers.0.", "midlayer."): x for name, x in wide.items()}
        self.ids, self.keys = target_ids(tensors), []

    def norm(self, name, x):
        return rms_norm(x, self.config["rms_norm_eps"]) * self.w[name]

    def turned(self, x, position):
        """Each head [heads, d] rotated as Llama does: feature m with feature m + d / 2."""
        half = x.shape[-1] // 2
        theta = self.config.get("rope_theta", 10000.0)
        turn = np.exp(1j * position * theta ** (-np.arange(half) / half))
        pairs = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    def read(self, states):
        """The hidden state of the target's three, [3 D] each token."""
        return self.w["fc.weight"] @ states

    def step(self, token, hidden, position):
        """One pass: its output before the last norm; its key and value are kept."""
        layer, w = "midlayer.", self.w
        normed = self.norm(layer + "hidden_norm.weight", hidden)
        embedded = self.norm(layer + "input_layernorm.weight", self.table[token])
        x = np.concatenate([embedded, normed])
        d = w[layer + "self_attn.q_proj.weight"].shape[0] // self.config["num_attention_heads"]
        q, k, v = ((w[f"{layer}self_attn.{n}_proj.weight"] @ x).reshape(-1, d) for n in "qkv")
        self.keys.append((self.turned(k, position), v))
        out = self.attention(self.turned(q, position))
        residual = normed if self.config.get("norm_before_residual") else hidden
        hidden = residual + w[layer + "self_attn.o_proj.weight"] @ out.reshape(-1)
        gate, up, down = (w[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        normed = self.norm(layer + "post_attention_layernorm.weight", hidden)
        return hidden + swiglu(normed, gate, up, down)

    def attention(self, q):
        group = len(q) // self.config["num_key_value_heads"]
        out = []
        for i, query in enumerate(q):
            scores = np.array([k[i // group] @ query for k, _ in self.keys]) / len(query) ** 0.5
            weights = np.exp(scores - scores.max())
            out.append(sum(w * v[i // group] for w, (_, v) in zip(weights, self.keys, strict=True)))
            out[-1] = out[-1] / weights.sum()
        return np.stack(out)

    def logits(self, hidden):
        return self.w["lm_head.weight"] @ self.norm("norm.weight", hidden)

    def draft(self, tokens, states, count, start=0, forced=None):
        """Reads places from `start` on, then guesses: the tokens, and the logits of each.

        Args:
            tokens: the token after each place.
            forced: goes on with these in place of the likeliest.
        """
        hidden, position = None, start
        for token, state in zip(tokens, states, strict=True):
            hidden = self.step(token, self.read(state), position)
            position += 1
        guesses, logits = [], []
        for n in range(count):
            logits.append(self.logits(hidden))
            guesses.append(int(self.ids[logits[-1].argmax()]))
            if n + 1 < count:
                token = guesses[-1] if forced is None else forced[n]
                hidden = self.step(token, hidden, position)
                position += 1
        return guesses, np.stack(logits)
