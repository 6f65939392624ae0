"""The self-test passes models that speak, and stops every layout that is easily mistaken."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.errors import UserError
from jaxmoe.eval.self_test import self_test
from jaxmoe.text import Tokenizer
from tests.conftest import one_device

DEMO = Path(__file__).parents[2] / "demo/model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    convert(DEMO, folder)
    return *store.load(folder, one_device(), "float32"), Tokenizer.load(folder)


def each_layer(params, change):
    return {**params, "layers": [change(layer) for layer in params["layers"]]}


def in_attention(name, change):
    def layer(p):
        return {**p, "attention": {**p["attention"], name: change(p["attention"][name])}}

    return lambda params: each_layer(params, layer)


def interleaved(w):
    """Rotary halves as pairs, as in Meta's older models."""
    d = w.shape[-1]
    return w[..., np.arange(d).reshape(2, -1).T.reshape(-1)]


def heads_inside(w):
    """[D, H, d] read as [D, d, H]."""
    D, H, d = w.shape
    return jnp.swapaxes(w.reshape(D, d, H), 1, 2)


def swapped_experts(params):
    """Up where gate should be, in every feed-forward block."""

    def swap(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {key: swap(value) for key, value in tree.items()}
        return tree | ({"gate": tree["up"], "up": tree["gate"]} if "gate" in tree else {})

    return each_layer(params, swap)


def rolled_experts(params):
    def layer(p):
        ffn = dict(p["feed_forward"])
        if "experts" in ffn:
            ffn["experts"] = jax.tree.map(lambda w: jnp.roll(w, 1, axis=0), ffn["experts"])
        return {**p, "feed_forward": ffn}

    return each_layer(params, layer)


MISTAKES = {
    "embedding rows": lambda p: {**p, "embed": jnp.roll(p["embed"], 1, axis=0)},
    "head transposed": lambda p: {**p, "lm_head": p["lm_head"].reshape(p["lm_head"].shape[::-1]).T},
    "q heads inside": in_attention("q", heads_inside),
    "v heads inside": in_attention("v", heads_inside),
    "rotary halves": in_attention("q", interleaved),
    "gate and up": swapped_experts,
    "experts": rolled_experts,
    "zeros": lambda p: {**p, "lm_head": jnp.zeros_like(p["lm_head"])},
    "NaN": lambda p: {**p, "norm": p["norm"] * jnp.nan},
}


def test_a_model_that_speaks(demo):
    config, params, tokenizer = demo
    speech = self_test(config, params, tokenizer)
    assert speech.surprise < 0.4
    assert self_test(config, params, None).surprise is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_layouts(demo, mistake):
    config, params, tokenizer = demo
    with pytest.raises(UserError, match="self-test"):
        self_test(config, MISTAKES[mistake](params), tokenizer)


def test_nan_is_named(demo):
    config, params, tokenizer = demo
    with pytest.raises(UserError, match=r"not finite, as norm holds NaN or infinity"):
        self_test(config, MISTAKES["NaN"](params), tokenizer)


def test_random_weights_say_little_but_something(small):
    assert 0.5 < self_test(small.config, small.params, None).entropy < 0.995
