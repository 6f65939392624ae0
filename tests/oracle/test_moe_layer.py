"""One MoE layer equal to transformers' on the same weights, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.moe import moe
from tests import tiny
from tests.conftest import load_tiny
from tests.oracle.draw import ROUNDING

pytestmark = pytest.mark.oracle

LAYER, EXPERTS, TOLERANCE = 1, 8, 1e-5
SKEW = {"plain": 0.0, "skewed": 4.0, "one expert": 40.0}  # how far tokens lie towards expert 5


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def model(request, tmp_path_factory):
    """Two layers, of which the second is looked at: another prefix than the first's is read."""
    k = request.param
    config = tiny.scout_like(num_hidden_layers=2, num_experts_per_tok=k, num_local_experts=EXPERTS)
    return load_tiny(tmp_path_factory.mktemp("moe"), config, tiny.random_tensors(config, 20 + k))


def draw(model, kind):
    """Tokens as a norm leaves them: the mean of their squares is 1."""
    router = model.tensors[f"model.layers.{LAYER}.feed_forward.router.weight"]
    x = np.random.default_rng(3).normal(size=(3, 40, model.config.hidden_size))
    x += SKEW[kind] * router[5] / np.linalg.norm(router[5])
    return (x / np.sqrt((x**2).mean(-1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("kind", SKEW)
def test_layer_equals_transformers(model, kind, ask_oracle, tmp_path):
    x = draw(model, kind)
    request = {"checkpoint": f"{model.checkpoint}/../hf", "moe_layer": LAYER}
    request |= {"input": str(tmp_path / "in.npy"), "output": str(tmp_path / "out.npz")}
    np.save(request["input"], x)
    ask_oracle(request)
    theirs = np.load(request["output"])
    k = model.config.num_experts_per_tok
    ordered = np.sort(theirs["logits"], axis=-1)
    assert (ordered[..., -k] - ordered[..., -k - 1]).min() > ROUNDING  # or either is right

    p = model.params["layers"][LAYER]["feed_forward"]
    out, stats = moe(model.config, p, jnp.asarray(x), jnp.ones(x.shape[:2], bool))
    np.testing.assert_allclose(out, theirs["out"], rtol=0, atol=TOLERANCE)
    check_stats(stats, theirs["logits"].astype(np.float64).reshape(-1, EXPERTS), k)
    if kind == "one expert":
        assert stats.assignments[5] == stats.tokens


def check_stats(stats, logits, k):
    """The router's statistics, from transformers' logits."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[:, :k].reshape(-1)
    np.testing.assert_array_equal(stats.assignments, np.bincount(chosen, minlength=EXPERTS))
    np.testing.assert_allclose(stats.mean_probability, p.mean(0), atol=1e-6)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
    np.testing.assert_allclose(stats.entropy, entropy, atol=1e-5)
    assert (stats.tokens, stats.dropped) == (len(logits), 0)
