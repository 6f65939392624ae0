"""Equal to transformers on configurations drawn at random: `make oracle`.

`JAXMOE_ORACLE_SEED`, which `make oracle` prints, repeats a run; each test's name ends in its seed.
`JAXMOE_ORACLE_DRAWS=100` draws more.
"""

import os

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from tests import formats, tiny
from tests.conftest import load_tiny, one_device
from tests.oracle import draw
from tests.oracle.conftest import NEW_TOKENS

pytestmark = pytest.mark.oracle

DRAWS = int(os.environ.get("JAXMOE_ORACLE_DRAWS", "12"))
TOP = 5
SEED = int(os.environ.get("JAXMOE_ORACLE_SEED", "0"))


def greedy(model, prompts):
    """The answers' output records, with the log-probabilities of prompts and answers."""
    requests = [Request(str(i), tuple(row.tolist()), NEW_TOKENS) for i, row in enumerate(prompts)]
    settings = Sampling(temperature=0.0, logprobs=TOP, prompt_logprobs=TOP)
    with jax.set_mesh(one_device()):
        stream = generate(model.config, model.params, requests, settings, stop_ids=())
        records = {token.request.id: token.completion.record() for token in stream}
    return [records[request.id] for request in requests]


def told(entries):
    """Each token's log-probability, and those of the likeliest in its place."""
    tops = [[top["logprob"] for top in entry["top_logprobs"]] for entry in entries]
    return np.array([entry["logprob"] for entry in entries]), np.array(tops)


def check_logprobs(records, tokens, logits):
    """Prompts' tokens after the first and answers' first are as likely as in transformers."""
    logits = logits.astype(np.float64)
    logprobs = logits - np.log(
        np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    logprobs -= logits.max(-1, keepdims=True)
    for record, row, theirs in zip(records, tokens, logprobs, strict=True):
        following = [*row[1:].tolist(), record["tokens"][0]]
        ours, tops = told([*record["prompt_logprobs"][1:], record["logprobs"]["content"][0]])
        theirs = theirs[: len(row)]
        np.testing.assert_allclose(ours, theirs[np.arange(len(row)), following], atol=1e-4)
        np.testing.assert_allclose(tops, np.sort(theirs)[:, : -TOP - 1 : -1], atol=1e-4)


@pytest.mark.parametrize("seed", range(SEED, SEED + DRAWS))
def test_random_configuration(seed, transformers, tmp_path):
    hf_config, tokens, info = draw.draw(seed)
    start = info["decode_from"]
    model = load_tiny(tmp_path, hf_config, tiny.random_tensors(hf_config, info["weights_seed"]))
    theirs = transformers(tmp_path / "hf", tmp_path, tokens, start)
    full = token_logits(model.config, model.params, tokens)
    assert abs(full - theirs["full"]).max() < 1e-4
    decode = token_logits(model.config, model.params, tokens, decode_from=start)
    assert abs(decode - theirs["decode"]).max() < 1e-4
    answers = greedy(model, tokens[:, :start])
    np.testing.assert_array_equal([answer["tokens"] for answer in answers], theirs["greedy"])
    check_logprobs(answers, tokens[:, :start], theirs["full"])


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_exported_files_are_read_by_transformers(name, request, transformers, tmp_path):
    """What export writes, config.json included, means the same to transformers."""
    model = request.getfixturevalue(name)
    export(model.checkpoint, tmp_path / "exported")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 50), np.int32)
    theirs = transformers(tmp_path / "exported", tmp_path, tokens, 20)
    ours = token_logits(model.config, model.params, tokens)
    assert abs(ours - theirs["full"]).max() < 1e-4


def test_exported_vision_is_read_by_transformers(transformers, tmp_path):
    """Every tensor has its place there, and the text model says the same."""
    like = tiny.maverick_like(num_hidden_layers=4)
    config, tensors = formats.multimodal(like, tiny.random_tensors(like, 4))
    tiny.write_checkpoint(tmp_path / "hf", config, tensors)
    convert(tmp_path / "hf", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "exported")
    model, params = store.load(tmp_path / "orbax", one_device())
    tokens = np.random.default_rng(0).integers(0, 120, (2, 50), np.int32)  # no image tokens
    theirs = transformers(tmp_path / "exported", tmp_path, tokens, 20)
    assert abs(token_logits(model, params, tokens) - theirs["full"]).max() < 1e-4


@pytest.mark.parametrize("ranks", [1, 4])
def test_meta_files_say_what_transformers_says(ranks, transformers, tmp_path):
    """Converted from Meta's ranks, exported, and read by transformers: the original's logits."""
    config = tiny.maverick_like(num_hidden_layers=4)
    tensors = tiny.random_tensors(config, 5)
    found = formats.in_meta(config, tensors, ranks)
    formats.write_meta(tmp_path / "meta", formats.meta_params(config), found, ranks)
    tiny.write_checkpoint(tmp_path / "hf", config, tensors)
    convert(tmp_path / "meta", tmp_path / "orbax")
    tokens = np.random.default_rng(0).integers(0, 120, (2, 50), np.int32)
    theirs = transformers(tmp_path / "hf", tmp_path, tokens, 20)
    model, params = store.load(tmp_path / "orbax", one_device())
    assert abs(token_logits(model, params, tokens) - theirs["full"]).max() < 1e-4
