"""Drafts change how many steps an answer takes, and nothing else about it.

`JAXMOE_WORKLOADS=10` runs ten times as many random workloads.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation import lookup
from jaxmoe.generation.choices import _follows_right
from jaxmoe.generation.document import new_document, read
from jaxmoe.generation.engine import Engine, generate
from jaxmoe.generation.grammar import Grammar, GrammarCompiler
from jaxmoe.generation.lookup import Lookup
from jaxmoe.generation.request import Request
from jaxmoe.generation.sampling import RepetitionDetection, Sampling
from jaxmoe.images import open_picture
from jaxmoe.mesh import MeshConfig
from tests.conftest import one_device
from tests.generate import pictures
from tests.generate.conftest import TOKENIZER
from tests.tiers import TIMES, with_more_workloads

END = TOKENIZER.specials["<|eot|>"]
LETTERS = TOKENIZER.encode("abcdef \n")
STEMS = ["ab ", "abcabd ", "the ", "a", "fade a bed\n"]
GRAMMARS = [
    Grammar("regex", "((ab )*|(fade a bed\n)*)(cd)?"),
    Grammar("choice", '["abcabdabcabdabcabdab", "fade a bed", "fade a bad bed"]'),
    Grammar("json_schema", '{"type": "array", "items": {"enum": ["ab", "abc"]}, "maxItems": 6}'),
]


def mesh_of(spec):
    return MeshConfig.parse(spec).make() if spec else one_device()


def draw_text(rng, most):
    """Stems again and again, with a slip now and then; chunks have 16 tokens, pages 64 or 128."""
    text: list[int] = []
    while len(text) < most:
        text += TOKENIZER.encode(STEMS[rng.integers(len(STEMS))]) * int(rng.integers(1, 8))
        if rng.random() < 0.3:
            text.append(int(rng.choice(LETTERS)))
    return text[:most]


def draw_sampling(rng):
    """Settings under which answers repeat themselves: few tokens are likely, or may come at all."""
    likely = tuple(
        (int(token), float(rng.uniform(4, 12))) for token in rng.choice(LETTERS, 3, replace=False)
    )
    given = {
        "temperature": float(rng.choice([0.0, 0.4, 1.0])),
        "top_k": int(rng.choice([0, 5])),
        "top_p": float(rng.choice([0.9, 1.0])),
        "min_p": float(rng.choice([0.0, 0.05])),
        "seed": int(rng.integers(100)),
        "logprobs": [None, 0, 2][rng.integers(3)],
        "include_stop_in_output": bool(rng.random() < 0.3),
    }
    kind = rng.integers(7)
    if kind == 0:
        return Sampling(**given, grammar=GRAMMARS[rng.integers(len(GRAMMARS))])
    if kind == 1:
        given |= {"frequency_penalty": 0.3, "presence_penalty": 0.1, "repetition_penalty": 1.1}
    if kind == 2:
        watch = RepetitionDetection(max_pattern_size=6, min_count=int(rng.integers(3, 8)))
        given |= {"repetition_detection": watch}
    if kind == 3:
        allowed = [*map(int, rng.choice(LETTERS, 2, replace=False)), END]
        given |= {"allowed_ids": tuple(allowed), "min_tokens": int(rng.integers(0, 5))}
    if kind == 4:
        given |= {"stop": ("ba", "ed\n", "abab"), "min_tokens": int(rng.integers(0, 20))}
    if kind == 5:
        given |= {"stop_ids": (int(rng.choice(LETTERS)),), "min_tokens": int(rng.integers(0, 30))}
    return Sampling(**given, logit_bias=likely)


# A workload's programs depend on what any of its requests asks for: this one asks for everything.
EVERYTHING = Sampling(
    temperature=0.5, top_k=9, top_p=0.95, min_p=0.01, frequency_penalty=0.1, logprobs=2,
    logit_bias=tuple((token, 1.0) for token in LETTERS[:8]), grammar=GRAMMARS[0],
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


def draw_requests(rng, count, settings=draw_sampling):
    """Prompts of 1 to 200 tokens, of which some begin alike and some are asked twice."""
    stems = [[], draw_text(rng, int(rng.integers(70, 150)))]
    requests = [Request("all", tuple(draw_text(rng, 9)), 4, EVERYTHING)]
    requests = requests if settings is draw_sampling else []
    while len(requests) < count:
        stem = stems[rng.integers(2)]
        prompt = tuple((stem + draw_text(rng, int(rng.integers(1, 50))))[:200])
        sampling = settings(rng)
        new = max(sampling.min_tokens, int(rng.integers(1, 50)))
        for answer in range(2 if rng.random() < 0.2 else 1):
            requests.append(Request(f"{len(requests)}#{answer}", prompt, new, sampling))
    return requests


def answers_of(config, params, requests, *, later=(), **options):
    """The completions by id, and the engine.

    Args:
        later: requests that come while others run.
    """
    options = {"rows": 4, "step_tokens": 32, "tokenizer": TOKENIZER} | options
    left, done = list(later), {}
    engine = Engine(config, params, requests, grows=True, **options)
    for token in engine.run(more=lambda: [left.pop(0)] if left else []):
        if token.finish_reason:
            done[token.request.id] = token.completion
    assert len(done) == len(requests) + len(later)
    return done, engine


def values_of(entries):
    """Log-probabilities of the tokens, and of the likeliest in their place."""
    return [x for one in entries or () for x in (one.logprob, *(value for _, value in one.top))]


def check_same(found, expected, within=1e-5):
    for id_, one in expected.items():
        other = found[id_]
        assert other.tokens == one.tokens, id_
        assert other.text == one.text, id_
        assert (other.finish_reason, other.stop_reason) == (one.finish_reason, one.stop_reason)
        assert (other.count, other.record().get("warning")) == (
            one.count,
            one.record().get("warning"),
        )
        assert values_of(other.logprobs) == pytest.approx(values_of(one.logprobs), abs=within)


def compare(
    config, params, rng, *, count=10, settings=draw_sampling, waits=True, within=1e-5, **options
):
    """Runs a random workload with and without drafts; returns how many were right, and tried.

    Args:
        waits: whether a third of the requests come while others run.
    """
    requests = draw_requests(rng, count, settings)
    later = [requests.pop() for _ in range(count // 3 * waits)]
    options["later"] = later
    expected, _ = answers_of(config, params, requests, **options | {"drafts": 0})
    found, _ = answers_of(config, params, requests, **{"drafts": 5} | options)
    check_same(found, expected, within)
    assert not any(x.drafted or x.accepted for x in expected.values())
    return (
        sum(sum(x.accepted) for x in found.values()),
        sum(sum(x.drafted) for x in found.values()),
    )


def few_letters(rng):
    """Answers of three letters, which repeat themselves, with their log-probabilities."""
    letters = tuple(int(token) for token in rng.choice(LETTERS, 3, replace=False))
    return Sampling(temperature=0.0, allowed_ids=letters, logprobs=1)


def test_answers_are_the_same(llm_model):
    rng, right = np.random.default_rng(0), 0
    with jax.set_mesh(one_device()):
        for _ in range(2):
            right += compare(
                llm_model.config, llm_model.params, rng, count=6, drafts=3, settings=few_letters
            )[0]
    assert right


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_all_kinds_are_the_same(llm_model, rows):
    """Drawn, penalized, with grammars, stop strings, bias, log-probabilities; two at once."""
    rng, right, tried = np.random.default_rng(rows), 0, 0
    with jax.set_mesh(one_device()):
        for _ in range(TIMES * 12):
            more = compare(llm_model.config, llm_model.params, rng, rows=rows)
            right, tried = right + more[0], tried + more[1]
    assert 0 < right < tried


MESHES = [
    "sequence=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
    "data=2,expert=2,sequence=2",
    "expert=4,sequence=2",
]


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.parametrize("spec", [MESHES[1], *with_more_workloads(MESHES[3])])
def test_answers_on_meshes_are_the_same(llm_model, spec):
    """Groups of rows have as many lines as the one that needs most, of drafts or of rows."""
    rng, right = np.random.default_rng(7), 0
    with jax.set_mesh(mesh_of(spec)):
        params = llm_model.on(jax.sharding.get_mesh())
        for _ in range(TIMES * 6):
            right += compare(llm_model.config, params, rng, count=12, rows=8)[0]
    assert right


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.parametrize(
    ("spec", "kv"),
    [
        ("sequence=2,tensor=4", "int4"),
        *with_more_workloads((None, "int8"), ("data=2,expert=2,sequence=2", "fp8")),
    ],
)
def test_answers_from_quantized_caches_are_the_same(llm_model, spec, kv):
    """A prompt that is read in other pieces has other answers there: so all are read at first."""
    rng, right = np.random.default_rng(7), 0
    options = {"rows": 16, "kv": kv, "within": 1e-3, "waits": False}
    with jax.set_mesh(mesh_of(spec)):
        params = llm_model.on(jax.sharding.get_mesh())
        for _ in range(TIMES * 4):
            right += compare(llm_model.config, params, rng, count=7, **options)[0]
    assert right


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, "data=2,sequence=2,tensor=2"])
def test_after_a_document(llm_model, spec):
    """Whose tokens are not looked up, and whose length moves the chunks' edges."""
    rng, right = np.random.default_rng(1), 0
    config = dataclasses.replace(llm_model.config, max_position_embeddings=2048)
    with jax.set_mesh(mesh_of(spec)):
        params = llm_model.on(jax.sharding.get_mesh())
        for length in 100, 77:
            text = draw_text(rng, length)
            requests = draw_requests(rng, 6)
            found = []
            for drafts in 0, 5:
                empty = new_document(config, params, length + 6 * 128)
                *_, document = read(config, params, empty, text)
                options = {"document": document, "tokenizer": TOKENIZER, "rows": 4}
                stream = generate(config, params, requests, GREEDY, drafts=drafts, **options)
                found.append({x.request.id: x.completion for x in stream if x.finish_reason})
            check_same(found[1], found[0])
            right += sum(sum(x.accepted) for x in found[1].values())
    assert right


@pytest.mark.slow
def test_about_pictures():
    """References to a picture's features stand for no token that could be a draft."""
    picture = open_picture(pictures.WIDE, pictures.SETTINGS, "x")
    seen = pictures.IDS.layout(picture.grid, pictures.SETTINGS.tokens_per_tile)
    rng, params = np.random.default_rng(3), pictures.random_params()
    requests = []
    for i in range(6):
        text, sampling = draw_text(rng, 30), Sampling(temperature=0.0, logit_bias=((65, 9.0),))
        prompt = (*text[:20], *seen, *text[20:], *seen, *text[:20])
        requests.append(Request(i, prompt, 30, sampling, pictures=(picture, picture)))
    with jax.set_mesh(one_device()):
        found = [
            answers_of(pictures.MODEL, params, requests, drafts=drafts, step_tokens=64)[0]
            for drafts in (0, 5)
        ]
    check_same(found[1], found[0])
    assert sum(sum(x.accepted) for x in found[1].values())


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_records(llm_model):
    """Some answers come from a run that ended early, the others from the next one."""
    requests = draw_requests(np.random.default_rng(4), 12)
    config, params, options = llm_model.config, llm_model.params, {"rows": 3}

    def records(asked, most, drafts):
        steps = itertools.count()
        stream = generate(
            config, params, asked, GREEDY, drafts=drafts, tokenizer=TOKENIZER,
            stop=lambda: next(steps) == most, **options,
        )  # fmt: skip
        return {x.request.id: x.completion.record() for x in stream if x.finish_reason}

    with jax.set_mesh(one_device()):
        expected = records(requests, 10_000, 0)
        first = records(requests, 15, 5)
        left = [request for request in requests if request.id not in first]
        second = records(left, 10_000, 5)
    assert first and second
    for id_, record in (first | second).items():
        assert without_logprobs(record) == without_logprobs(expected[id_])


def without_logprobs(record):
    """They are compared within rounding elsewhere."""
    return {name: value for name, value in record.items() if name != "logprobs"}


def test_fewer_steps(llm_model):
    """An answer that repeats a token takes a fraction of them; no draft goes beyond a chunk."""
    sampling = Sampling(temperature=0.0, allowed_ids=tuple(LETTERS[:1]), logprobs=1)
    request = Request("a", tuple(draw_text(np.random.default_rng(0), 20)), 60, sampling)
    with jax.set_mesh(one_device()):
        expected, _ = answers_of(llm_model.config, llm_model.params, [request], drafts=0)
        found, engine = answers_of(llm_model.config, llm_model.params, [request], drafts=3)
    check_same(found, expected)
    assert found["a"].count == 60
    assert engine.steps < 60 / 2
    assert sum(found["a"].accepted) > 30
    assert sum(found["a"].accepted) + engine.steps >= 60


def test_no_drafts_where_all_rows_work(llm_model):
    sampling = Sampling(temperature=0.0, allowed_ids=tuple(LETTERS[:1]))
    requests = [Request(i, tuple(LETTERS), 30, sampling) for i in range(4)]
    with jax.set_mesh(one_device()):
        found, engine = answers_of(llm_model.config, llm_model.params, requests, drafts=3)
    assert sum(sum(x.drafted) for x in found.values()) == 0
    assert engine.steps <= 32


def test_only_tokens_after_right_drafts_are_counted():
    """Rows of three, one, two and four places; the draft of the second place of the last errs."""
    drafts = [-1, 5, 6, -1, -1, 7, -1, 8, 9, 2]
    tokens = [5, 6, 1, 4, 7, 3, 2, 9, 2, 2]
    right = _follows_right(jnp.array(tokens), jnp.array(drafts))
    assert right.tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("limit", ["max_tokens=9", 'stop="x"'])
def test_a_grammar_goes_on_from_before_its_drafts(limit):
    """llguidance cannot take tokens back from grammars with such limits."""
    grammar = Grammar("lark", f"start: name\nname[{limit}]: /[ab]+/")
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, (END,))
    matcher, other = compiler.matcher(grammar), compiler.matcher(grammar)
    drafts = TOKENIZER.encode("abab")
    assert matcher.allowed(drafts) == 4
    masks = [matcher.mask(drafts[:count]) for count in range(4)]
    for draft, mask in zip(drafts, masks, strict=True):
        assert mask.tolist() == other.mask().tolist() == matcher.mask().tolist()
        assert other.accept(draft) and matcher.accept(draft)


def test_drafts_below_0_are_refused(llm_model):
    with pytest.raises(UserError, match="drafts -1 is below 0"):
        generate(llm_model.config, llm_model.params, [Request("a", (1,), 1)], GREEDY, drafts=-1)


def taken(prompt, *answer):
    found = Lookup(prompt)
    found.take(answer)
    return found


def test_what_followed_the_longest_end_comes_first():
    assert taken([1, 2, 3, 7, 9, 2, 3, 8, 5]).drafts(3) == ()
    assert taken([1, 2, 3, 7, 5], 1, 2, 3).drafts(2) == (7, 5)
    longer = [4, 5, 1, 2, 3, 7, 0, 1, 2, 3, 8, 6]
    assert taken(longer, 1, 2, 3).drafts(1) == (8,)  # the last time, of three tokens
    assert taken(longer, 4, 5, 1, 2, 3).drafts(2) == (7, 0)  # of five tokens


def test_drafts_go_on_beyond_the_end_of_the_text():
    assert taken([1, 2, 1, 2, 1]).drafts(5) == (2, 1, 2, 1, 2)
    assert taken([7] * 9).drafts(4) == (7,) * 4


def test_lookups_that_are_wrong_are_counted():
    found = taken([1, 2, 3, 4, 5, 6] * 2)
    assert found.right == lookup.UNKNOWN
    found.take([1, 2, 3])
    assert found.right > lookup.UNKNOWN
    before = found.right
    found.take([1, 2, 3, 9])
    assert found.right < before
    found.take([1, 2, 3, 9, 10, 11])  # nothing was said of these
    assert found.right == pytest.approx(before * (1 - lookup.RATE))


def test_a_long_text_takes_bounded_memory(monkeypatch):
    """Old tokens are dropped, and drafts are those of the newest."""
    monkeypatch.setattr(lookup, "KEPT", 50)
    rng = np.random.default_rng(0)
    answer = rng.integers(0, 1000, 1000).tolist() * 2
    found = Lookup([1, 2, 3])
    for end in range(1, len(answer)):
        found.take(answer[:end])
        assert len(found._tokens) <= 100
        assert all(len(after) <= 100 for after in found._after)
    repeated = rng.integers(0, 1000, 20).tolist()
    found.take([*answer, *repeated, *repeated[:6]])
    assert found.drafts(3) == tuple(repeated[6:9])
