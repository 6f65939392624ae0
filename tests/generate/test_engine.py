"""The engine: any number of requests in any number of rows gives what each would give alone."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.pool import HOLDERS, lay_out, layout_of, new_cache
from jaxmoe.generation.sampling import NO_TOKEN, Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, cache_kinds
from jaxmoe.model.steps import step
from tests import reference, tiny
from tests.conftest import load_tiny, one_device

CONTEXT = 57
GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=3)
LENGTHS = [37, 1, 16, 23, 5, 15, 50]  # of prompts; a chunk is 16 tokens
WANTED = 20  # the last prompt leaves room for 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One local and one global layer, and a context so short that prompts reach its end."""
    config = tiny.scout_like(
        num_hidden_layers=2, no_rope_layer_interval=2, max_position_embeddings=CONTEXT
    )
    return load_tiny(tmp_path_factory.mktemp("engine"), config, tiny.random_tensors(config, 3))


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 120, n).tolist()) for n in LENGTHS]
    return [
        Request(f"request {n}", tokens, WANTED) for n, tokens in zip(LENGTHS, prompts, strict=True)
    ]


def run(model, requests, sampling, *, params=None, mesh=None, **options):
    """Answers as (tokens, finish reason) by request id."""
    options = {"rows": 3, "step_tokens": 8, "stop_ids": ()} | options
    answers, reasons = collections.defaultdict(list), {}
    with jax.set_mesh(mesh or one_device()):
        stream = generate(model.config, params or model.params, requests, sampling, **options)
        for request, token, reason in stream:
            assert request.id not in reasons, "a token after the last"
            answers[request.id].append(token)
            reasons |= {request.id: reason} if reason else {}
    return {id: (answers[id], reasons[id]) for id in answers}


@pytest.fixture(scope="module")
def naive(model, requests):
    """Greedy answers in float64: a whole forward pass for every token."""
    return {r.id: (naive_answer(model, r), "length") for r in requests}


def naive_answer(model, request):
    tokens = list(request.tokens)
    while len(tokens) < min(CONTEXT, len(request.tokens) + request.max_new_tokens):
        logits = reference.logits(model.hf_config, model.tensors, [tokens])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(request.tokens) :]


@pytest.fixture(scope="module")
def sampled(model, requests):
    return run(model, requests, SAMPLED)


@pytest.mark.parametrize("chunk", [1, 8, 24])
def test_greedy_is_the_naive_loop(model, requests, naive, chunk):
    """Seven requests in three rows, across chunks, however prompts are cut into chunks."""
    assert run(model, requests, GREEDY, step_tokens=chunk) == naive


def test_sampled_requests_do_not_notice_each_other(model, requests, sampled):
    alone = {}
    for request in requests:
        alone |= run(model, [request], SAMPLED)
    assert sampled == alone


def test_sampled_tokens_do_not_depend_on_prefill_chunks(model, requests, sampled):
    assert run(model, requests, SAMPLED, step_tokens=1) == sampled


def test_a_used_row_is_like_a_new_one(model, requests, sampled):
    """One row serves all, the longest first, and nothing of it stays behind."""
    in_turn = run(model, requests, SAMPLED, rows=1)
    assert in_turn == sampled
    assert list(in_turn) == [request.id for request in requests]


def test_sampling_is_not_greedy(naive, sampled):
    assert all(sampled[id] != naive[id] for id in naive)


def test_an_answer_ends_with_the_context(naive, sampled):
    """The fixture asks for more than fits after the longest prompt."""
    for answers in (naive, sampled):
        assert [len(tokens) for tokens, _ in answers.values()] == [20, 20, 20, 20, 20, 20, 7]


def test_the_number_of_new_tokens_is_kept(model, requests, naive):
    wanted = [1, 2, 3]
    short = [
        dataclasses.replace(r, max_new_tokens=n) for r, n in zip(requests[:3], wanted, strict=True)
    ]
    got = run(model, short, GREEDY)
    for request in short:
        assert got[request.id] == (naive[request.id][0][: request.max_new_tokens], "length")


def test_a_stop_token_ends_its_request_only(model, requests, naive):
    """The token is part of the answer; rows go on and take the requests that wait."""
    stops = {naive[requests[0].id][0][0], naive[requests[3].id][0][10]}
    got = run(model, requests, GREEDY, stop_ids=tuple(stops))
    reasons = set()
    for request in requests:
        tokens, _ = naive[request.id]
        end = next((i for i, token in enumerate(tokens) if token in stops), None)
        want = (tokens, "length") if end is None else (tokens[: end + 1], "stop")
        assert got[request.id] == want
        reasons.add(want[1])
    assert reasons == {"length", "stop"}


def test_a_stop_token_at_the_limit_is_a_stop(model, requests, naive):
    (tokens, _), request = naive[requests[0].id], requests[0]
    end = tokens.index(tokens[4])
    last = dataclasses.replace(request, max_new_tokens=end + 1)
    got = run(model, [last, *requests[1:3]], GREEDY, stop_ids=(tokens[4],))
    assert got[request.id] == (tokens[: end + 1], "stop")


def test_the_models_own_stop_tokens_are_the_default(model, requests, naive):
    """The head's columns are swapped so that the model says one of them as its second word."""
    tokens, _ = naive[requests[0].id]
    spoken, stop = tokens[1], model.config.eos_token_ids[1]
    order = np.arange(model.config.vocab_size)
    order[[spoken, stop]] = stop, spoken
    params = model.params | {"lm_head": model.params["lm_head"][:, order]}
    got = run(model, requests[:3], GREEDY, params=params, stop_ids=None)
    assert got[requests[0].id] == ([tokens[0], stop] if tokens[0] != spoken else [stop], "stop")


@pytest.mark.parametrize("spec", ["expert=4,sequence=2", "data=2,fsdp=2,tensor=2"])
def test_sampled_tokens_are_the_same_on_any_mesh(model, requests, sampled, spec):
    mesh = MeshConfig.parse(spec).make()
    assert run(model, requests, SAMPLED, params=model.on(mesh), mesh=mesh, rows=4) == sampled


def test_no_requests_no_tokens(model):
    assert run(model, [], GREEDY) == {}


@pytest.mark.parametrize(
    ("tokens", "wanted", "words"),
    [
        ((), 5, ["'x'", "no tokens"]),
        ((1, 2), 0, ["'x'", "0 new tokens"]),
        ((1,) * CONTEXT, 1, ["'x'", f"{CONTEXT} tokens", "context"]),
        ((1, 128), 5, ["'x'", "token 128", "0 to 127"]),
        ((-1, 2), 5, ["'x'", "token -1", "0 to 127"]),
    ],
    ids=["empty", "nothing wanted", "no room", "above the vocabulary", "below it"],
)
def test_impossible_requests_are_refused(model, tokens, wanted, words):
    """Before anything is computed, although a good one comes first."""
    requests = [Request("good", (1,), 1), Request("x", tokens, wanted)]
    with pytest.raises(UserError) as caught:
        generate(model.config, model.params, requests, GREEDY)
    assert all(word in str(caught.value) for word in words)


def test_no_rows_are_refused(model, requests):
    with pytest.raises(UserError, match="rows 0"):
        run(model, requests, GREEDY, rows=0)


@pytest.mark.slow
def test_each_width_and_setting_compiles_once(model, requests):
    """Another seed or temperature, and the cache that a step gives back, compile nothing new."""
    with jax.set_mesh(MeshConfig(expert=2, tensor=2, data=2).make()):
        params = model.on(jax.sharding.get_mesh())
        step.clear_cache()
        for settings in (GREEDY, Sampling(temperature=1.0, seed=3), Sampling(top_p=0.5, top_k=4)):
            list(generate(model.config, params, requests, settings, rows=2, step_tokens=8))
        assert step._cache_size() == 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_whose_logits_are_not_finite_ends_alone(model, requests, sampling):
    """Catches token 0 for ever, and a bad request that ends the others."""
    alone = run(model, requests[:3], sampling)
    used = {token for request in requests for token in request.tokens}
    used |= {token for tokens, _ in alone.values() for token in tokens}
    unused = min(set(range(model.config.vocab_size)) - used)
    embed = model.params["embed"].at[unused].set(np.nan)
    bad = Request("bad", (3, unused), WANTED)
    found = run(model, [bad, *requests[:3]], sampling, params=model.params | {"embed": embed})
    assert found.pop("bad") == ([NO_TOKEN], "error")
    assert found == alone


@pytest.mark.slow
def test_calls_of_any_length_run_the_same_programs(model, caplog):
    """With one request or many: at most six sizes of steps, and three of choices."""
    rng, compiled = np.random.default_rng(0), collections.Counter()
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"), jax.set_mesh(one_device()):
        for i in range(24):
            lengths = rng.integers(1, 50, (1, 1, 3, 8)[i % 4]).tolist()
            requests = [
                Request(n, tuple(rng.integers(0, 120, length).tolist()), 7)
                for n, length in enumerate(lengths)
            ]
            list(generate(model.config, model.params, requests, GREEDY, step_tokens=512))
    for record in caplog.records:
        for program in ("step", "choose_tokens"):
            compiled[program] += f"XLA compilation of jit({program})" in record.getMessage()
    assert 3 <= compiled["step"] <= 6
    assert compiled["choose_tokens"] == 3


def test_one_long_request_has_the_ring_of_one_row(model):
    """Rows for others cost no rings: at 10 million tokens eight would be gigabytes."""
    changes = {"max_position_embeddings": 131_072, "attention_chunk_size": 8192}
    config = dataclasses.replace(model.config, **changes)
    request = Request(0, (1,) * 100_000, 16, GREEDY)
    with jax.set_mesh(one_device()):
        one = layout_of(config, 8, [request])
        assert one.total == 1
        for layout in one, lay_out(8, HOLDERS):
            for tokens in None, 120_000:
                cache = new_cache(config, "bf16", layout, [request], [None], tokens)
                pools = zip(cache_kinds(config), cache.pools, strict=True)
                size = {kind.shares: pool.coords.segment.size for kind, pool in pools}
                assert size[True] < 1.3 * request.length
                spare = 2 * layout.total + 8  # pages that are begun; a pool's are a multiple of 8
                assert size[False] <= config.attention_chunk_size + spare * PAGE
