"""Several adapters in a batch: each request is answered as by the model with its adapter alone."""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import (
    LLM,
    Request,
    Sampling,
    UserError,
    generate,
    merge_adapters,
    one_adapter,
    read_document,
)
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.peft import adapter_digest, write_adapter
from jaxmoe.cli import devices
from jaxmoe.cli import generate as generate_command
from jaxmoe.generation.document import new_document, read
from jaxmoe.generation.prefixes import find_prefixes
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import adapters, moe
from jaxmoe.model.lora import is_lora
from jaxmoe.model.params import quantize_params
from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix
from tests import tiny
from tests.conftest import load_tiny, one_device

GREEDY = Sampling(temperature=0.0, logprobs=1)
RANKS = {  # by adapter and the end of a parameter's name
    "all": {"": 3},
    "attention": {"attention.q": 5, "attention.v": 5, "attention.o": 5},
    "experts": {"experts.gate": 2, "experts.up": 2, "router": 4},
}
NAMES = (*RANKS, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense local layer and a MoE global one."""
    config = tiny.maverick_like(num_hidden_layers=2, no_rope_layer_interval=2, num_local_experts=4)
    return load_tiny(tmp_path_factory.mktemp("served"), config, tiny.random_tensors(config, 7))


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Each adapter as PEFT's files, large enough to change what the model says."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, ends) in enumerate(RANKS.items()):
        ranks = {
            param: rank
            for param in adapters.adaptable(model.config)
            for end, rank in ends.items()
            if param.endswith(end)
        }
        abstract = adapters.abstract_adapters(model.config, one_device(), ranks)
        draw = functools.partial(drawn, np.random.default_rng(seed))
        pairs = jax.tree.map(draw, abstract)
        new = {param: adapters.Adapter(*pair, 0.5 + seed) for param, pair in pairs.items()}
        params = adapters.with_adapters(model.config, model.params, new)
        write_adapter(folder / name, model.config, params)
    return {name: folder / name for name in RANKS}


def drawn(rng, x):
    return 0.3 * jnp.array(rng.normal(size=x.shape), "f")


@pytest.fixture(scope="module")
def params(model, folders):
    return store.load(model.checkpoint, one_device(), adapters=folders)[1]


@pytest.fixture(scope="module")
def requests():
    """Two of each adapter and of none, which all begin with the same words."""
    rng = np.random.default_rng(0)
    stem = tuple(rng.integers(0, 120, 70).tolist())
    tails = [tuple(rng.integers(0, 120, n).tolist()) for n in (3, 11)]
    requests = [(name, stem + tail) for tail in tails for name in NAMES]
    return [Request(str(i), x, 6, adapter=name) for i, (name, x) in enumerate(requests)]


def answers(config, params, requests, mesh=None, **options):
    """Tokens and their log-probabilities by request."""
    options = {"rows": 4, "step_tokens": 16, "stop_ids": ()} | options
    found = {}
    with jax.set_mesh(mesh or one_device()):
        for token in generate(config, params, requests, GREEDY, **options):
            one = token.completion
            found[token.request.id] = one.tokens, [x.logprob for x in one.logprobs]
    return found


def alone(config, params, requests):
    """Each request by the model with its adapter and no other."""
    found = {}
    for request in requests:
        own = one_adapter(params, request.adapter)
        found |= answers(config, own, [dataclasses.replace(request, adapter=None)])
    return found


def check(found, expected):
    assert found.keys() == expected.keys()
    for id, (tokens, logprobs) in expected.items():
        assert found[id][0] == tokens
        np.testing.assert_allclose(found[id][1], logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def expected(model, params, requests):
    return alone(model.config, params, requests)


@pytest.mark.slow
def test_a_batch_of_several_adapters(model, params, requests, expected):
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(requests)
    check(answers(model.config, params, requests), expected)


def test_a_batch_without_adapters_runs_on_the_base_alone(model, params, requests):
    """No products for adapters, and fused steps, which take none."""

    class Seen(Exception):
        pass

    def forward(config, params, *arguments, **options):
        raise Seen(any(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora))))

    for chosen, expected in ((requests[3:4], False), (requests[2:4], True)):
        with pytest.raises(Seen, match=str(expected)):
            answers(model.config, params, chosen, forward=forward)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=2,expert=2,tensor=2"])
def test_a_batch_on_a_mesh(model, folders, requests, expected, spec, monkeypatch):
    """Prompts' tokens are sent to their experts, and single tokens are gathered."""
    monkeypatch.setattr(moe, "FEW_TOKENS", 8)
    mesh = MeshConfig.parse(spec).make()
    _, params = store.load(model.checkpoint, mesh, adapters=folders)
    check(answers(model.config, params, requests, mesh, rows=8), expected)


@pytest.mark.slow
def test_a_batch_over_a_quantized_base(model, params, requests):
    """As over the same base widened, by the programs of the test above."""
    quantized = quantize_params(model.config, params, "int8")

    def widened(w, plain):
        if is_lora(w):
            return dataclasses.replace(w, base=widened(w.base, plain.base))
        return dequantize_matrix(w).reshape(plain.shape) if is_quantized(w) else w

    wide = jax.tree.map(widened, quantized, params, is_leaf=lambda w: is_lora(w) or is_quantized(w))
    expected = answers(model.config, wide, requests)
    check(answers(model.config, quantized, requests), expected)


def is_quantized(w):
    return isinstance(w, QuantizedMatrix)


@pytest.fixture(scope="module")
def llm(model, folders):
    sizes = {"rows": 4, "step_tokens": 16}
    return LLM(model.checkpoint, mesh=one_device(), adapters=folders, **sizes)


def test_a_prompt_of_an_unknown_adapter_is_refused_alone(llm, requests, expected):
    prompts = [list(request.tokens) for request in requests[:4]]
    wanted = {"sampling": GREEDY, "max_new_tokens": 6}
    found = llm.generate(prompts, **wanted, adapter=["all", "chess", "experts", None])
    assert found[1].error == (
        "request '1': there is no adapter 'chess'; there are all, attention, experts."
    )
    assert [list(found[i].tokens) for i in (0, 2, 3)] == [expected[i][0] for i in "023"]
    with pytest.raises(UserError, match=r"there are 2 adapters for 4 prompts"):
        llm.generate(prompts, **wanted, adapter=["all", None])
    with pytest.raises(UserError, match=r"adapter 3 is no text"):
        llm.generate(prompts, **wanted, adapter=3)
    with pytest.raises(UserError, match=r"no adapter 'all'; the model has none by name"):
        LLM.from_parts(llm.config, one_adapter(llm.params, "all")).generate([[1]], adapter="all")


@pytest.mark.slow
def test_the_adapter_of_a_document_is_that_of_its_requests(
    llm, folders, requests, expected, tmp_path
):
    """The stem is read with one; its tails are asked with that one and with others."""
    text, tail = requests[0].tokens[:70], list(requests[0].tokens[70:])
    own, digest = one_adapter(llm.params, "all"), adapter_digest(folders["all"])
    with jax.set_mesh(llm.mesh):
        list(read_document(llm.config, own, text, tmp_path / "read", adapter=digest))
    asked = {"sampling": GREEDY, "max_new_tokens": 6, "document": tmp_path / "read"}
    answered, *refused = llm.generate([tail] * 3, **asked, adapter=["all", "attention", None])
    assert list(answered.tokens) == expected["0"][0]
    for result, has in zip(refused, ["the adapter 'attention'", "no adapter"], strict=True):
        assert f"has {has}, and the document was read with another" in result.error
    of_others = LLM.from_parts(llm.config, llm.params)  # which knows no files
    with pytest.raises(UserError, match="was read with a model of other weights"):
        of_others.generate([tail], **asked, adapter="attention")
    with jax.set_mesh(llm.mesh):
        empty = new_document(llm.config, llm.params, 200, adapter="all")
        with pytest.raises(UserError, match="request '1' has the adapter 'attention'"):
            generate(llm.config, llm.params, [requests[1]], GREEDY, document=empty)
        *_, document = read(llm.config, llm.params, empty, text)
    asked = [dataclasses.replace(requests[0], tokens=tuple(tail))]
    check(answers(llm.config, llm.params, asked, document=document), {"0": expected["0"]})


def test_a_model_alone_has_its_adapter_and_a_batch_of_names_none(model, folders, params):
    with pytest.raises(UserError, match="not both"):
        store.load(model.checkpoint, one_device(), adapter=folders["all"], adapters=folders)
    with pytest.raises(UserError, match="has the name ''; give text"):
        store.load(model.checkpoint, one_device(), adapters={"": folders["all"]})
    with pytest.raises(UserError, match="all, attention, experts; merge one"):
        merge_adapters(model.config, params)
    one = store.load(model.checkpoint, one_device(), adapter=folders["experts"])[1]
    jax.tree.map(np.testing.assert_array_equal, one_adapter(params, "experts"), one)
    jax.tree.map(np.testing.assert_array_equal, one_adapter(params, None), model.params)


def test_prompts_of_different_adapters_share_no_prefix():
    tokens = tuple(range(100))
    asked = [Request(i, (*tokens, i), 1, adapter=name) for i, name in enumerate("aabb")]
    first, second, third, fourth = find_prefixes([*asked, Request(4, tokens, 1)])[:4]
    assert first is second and third is fourth and first is not third
    assert (first.adapter, third.adapter) == ("a", "b")
    assert find_prefixes([asked[0], asked[2]]) == [None, None]


def test_lines_of_a_job_choose(model, folders, requests, expected, tmp_path, monkeypatch):
    """A bad line is refused alone, with its number."""
    lines = [
        {"id": r.id, "tokens": r.tokens, "adapter": r.adapter, "max_tokens": 6}
        for r in requests[:4]
    ]
    lines += [{"id": "x", "tokens": [1], "adapter": "chess"}]
    lines += [{"id": "y", "tokens": [1], "adapter": 7}]
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ["--rows", "4", "--step-tokens", "16", "--temperature", "0"]
    files = ["--prompts", str(asked), "--output", str(answered)]
    run(monkeypatch, model, folders, *files, *sizes)
    records = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [r["tokens"] for r in records[:4]] == [expected[r.id][0] for r in requests[:4]]
    assert records[4]["error"].startswith(f"{asked} line 5: request 'x': there is no adapter")
    assert records[5]["error"] == f"{asked} line 6: adapter 7 is no text; give the name of one."
    with pytest.raises(UserError, match="--prompt takes one --adapter FOLDER"):
        run(monkeypatch, model, folders, "--prompt", "a")


def run(monkeypatch, model, folders, *options):
    """`jaxmoe generate` in this process, on one device."""
    monkeypatch.setattr(devices, "start", lambda args: one_device())
    named = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    monkeypatch.setattr("sys.argv", ["generate", model.checkpoint, *named, *options])
    generate_command.main()


def test_adapters_by_the_flag(tmp_path):
    def given(*values):
        return devices.adapters_by(argparse.Namespace(adapter=list(values)))

    odd = tmp_path / "lr=1"
    odd.mkdir()
    assert given() == {"adapter": None, "adapters": {}}
    assert given("a/lr=2")["adapter"] == "a/lr=2" and given(str(odd))["adapter"] == str(odd)
    assert given("a=x", "b=y=z") == {"adapter": None, "adapters": {"a": "x", "b": "y=z"}}
    with pytest.raises(UserError, match="--adapter x has no name, and there are others"):
        given("x", "a=y")
    with pytest.raises(UserError, match="two folders the name 'a'"):
        given("a=x", "a=y")
