"""generate_text: one prompt's answer is that of the engine and the decoder, wherever params lie."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmoe import generate_text
from jaxmoe.errors import UserError
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.text import render
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.small_tokenizers import byte_tokenizer

GREEDY = Sampling(temperature=0.0)
TOKENIZER = byte_tokenizer()
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2, vocab_size=260)
    return load_tiny(tmp_path_factory.mktemp("text"), config, tiny.random_tensors(config, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("Hello", TOKENIZER.encode("Hello", bos=True)), (CHAT, render(CHAT, TOKENIZER))],
    ids=["text", "chat"],
)
def test_the_answer_is_the_engines(model, prompt, tokens):
    request, stop_ids = Request("0", tuple(tokens), 8), (0, 1, *TOKENIZER.stop_ids)
    config = dataclasses.replace(model.config, eos_token_ids=(0, 1))
    with jax.set_mesh(one_device()):
        stream = generate(config, model.params, [request], GREEDY, stop_ids=stop_ids)
        expected = TOKENIZER.decode([token.token for token in stream])
    options = {"max_new_tokens": 8, "sampling": GREEDY}
    params = model.on(MeshConfig.parse("tensor=2").make(jax.devices()[:2]))
    assert generate_text(config, params, TOKENIZER, prompt, **options) == expected


def test_logits_that_are_not_finite_are_an_error(model):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.params)
    with pytest.raises(UserError, match="not finite"):
        generate_text(model.config, params, TOKENIZER, "Hello", max_new_tokens=2)
