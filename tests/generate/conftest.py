"""A tiny model with a tokenizer of bytes, as `jaxmoe.LLM`."""

import pytest

from jaxmoe import LLM
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.small_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONTEXT = 384
CONFIG = tiny.scout_like(
    num_hidden_layers=2,  # one local, one global
    no_rope_layer_interval=2,
    vocab_size=260,
    max_position_embeddings=CONTEXT,
    bos_token_id=256,
    eos_token_id=[259],
    pad_token_id=256,
)


@pytest.fixture(scope="module")
def llm_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    made = load_tiny(folder, CONFIG, tiny.random_tensors(CONFIG, 5))
    TOKENIZER.save(made.checkpoint)
    return made


@pytest.fixture(scope="module")
def llm(llm_model):
    return LLM(llm_model.checkpoint, mesh=one_device(), rows=4)
