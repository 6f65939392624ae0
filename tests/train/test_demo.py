"""The committed demo model is the one that demo/metrics.json and demo/README.md speak of."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from demo.demo_report import with_numbers
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.hf_config import from_hf, read_config
from jaxmoe.model.params import num_params
from jaxmoe.model.transformer import forward, positions_of, unembed
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import read_train_config
from jaxmoe.train.data import held_out_batches
from jaxmoe.train.evaluation import held_out_loss
from tests import reference
from tests.conftest import one_device

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo" / "model"
METRICS = json.loads((ROOT / "demo" / "metrics.json").read_text())
TRAINING = read_train_config(ROOT / "configs" / "demo.yaml")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The model, in float32."""
    checkpoint = tmp_path_factory.mktemp("demo") / "checkpoint"
    convert(MODEL, checkpoint)
    return store.load(checkpoint, one_device(), "float32")


@pytest.fixture(scope="module")
def snippet():
    """The tokens of the text in metrics.json, which span two chunks."""
    tokens = Tokenizer.load(MODEL).encode(METRICS["snippet"]["text"], bos=True)
    assert len(tokens) > TRAINING.model["attention_chunk_size"]
    return np.array(tokens)


def test_the_snippet_costs_what_the_metrics_say(demo, snippet):
    config, params = demo
    rows = {"length": TRAINING.rows.length, "rows": TRAINING.rows.batch_size}
    batches = held_out_batches(snippet, config.bos_token_id, **rows)
    loss = held_out_loss(TRAINING, config, params, batches=batches)["held_out_loss"]
    np.testing.assert_allclose(loss, METRICS["snippet"]["nats_per_token"], rtol=1e-5)


def test_the_metrics_are_those_of_the_numpy_reference(snippet):
    stored = load_file(MODEL / "model.safetensors")
    tensors = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    config = json.loads((MODEL / "config.json").read_text())
    logits = reference.logits(config, tensors, snippet[None])[0, :-1]
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), snippet[1:]]
    np.testing.assert_allclose(nats.mean(), METRICS["snippet"]["nats_per_token"], rtol=1e-5)


def test_greedy_text_is_the_one_in_the_metrics(demo):
    """One forward pass over prompt and text: each token of the text is the likeliest."""
    config, params = demo
    tokenizer, texts = Tokenizer.load(MODEL), METRICS["continuations"]
    prompt = tokenizer.encode(texts["prompt"], bos=True)
    tokens = jnp.array([prompt + tokenizer.encode(texts["greedy"])])
    segment_ids = jnp.ones_like(tokens)
    out = forward(config, params, tokens, positions_of(segment_ids), segment_ids)
    likeliest = jnp.argmax(unembed(config, params, out.hidden), axis=-1)
    start = len(prompt)
    np.testing.assert_array_equal(likeliest[0, start - 1 : -1], tokens[0, start:])


def test_it_clearly_beats_the_bigram_model():
    model, bigram = METRICS["model"], METRICS["bigram"]
    assert model["nats_per_token"] < bigram["nats_per_token"] - 0.5
    assert model["bits_per_byte"] < bigram["bits_per_byte"] * 0.9


def test_the_readme_has_the_numbers_of_the_metrics():
    readme = (ROOT / "demo" / "README.md").read_text()
    assert with_numbers(readme, METRICS) == readme


def test_the_model_is_the_one_that_the_config_trains():
    config = read_config(MODEL)
    assert config == from_hf(TRAINING.model, "configs/demo.yaml")
    assert num_params(config) == METRICS["parameters"]
    assert Tokenizer.load(MODEL).vocab_size == config.vocab_size


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 11e6
