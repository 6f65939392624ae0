"""A head's guesses in the engine are those of NumPy's passes, and change no answer.

`JAXMOE_WORKLOADS=10` runs ten times as many random workloads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import forward
from jaxmoe.checkpoint.heads import Head
from jaxmoe.eagle_config import eagle_from_hf
from jaxmoe.errors import UserError
from jaxmoe.generation import drafts, head_drafts
from jaxmoe.generation.document import new_document, read
from jaxmoe.generation.drafts import drafts_for
from jaxmoe.generation.engine import Engine, generate
from jaxmoe.generation.head_drafts import HeadDrafts
from jaxmoe.generation.request import Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.images import open_picture
from jaxmoe.model.adapters import Adapters, abstract_adapters, with_adapters
from jaxmoe.model.eagle import abstract_eagle
from tests import eagle
from tests.conftest import one_device
from tests.generate import pictures
from tests.generate.conftest import TOKENIZER
from tests.generate.test_drafts import (
    GREEDY,
    LETTERS,
    MESHES,
    answers_of,
    check_same,
    compare,
    draw_requests,
    mesh_of,
)
from tests.tiers import TIMES, with_more_workloads

SIZES = {"vocab_size": 260, "num_key_value_heads": 4}
MAPPING = eagle.head_config(**SIZES, draft_vocab_size=4)
TENSORS = eagle.head_tensors(MAPPING, 7)
# It guesses four letters, and answers have two of them: so about a quarter of guesses are right.
IDS = np.sort(LETTERS)[:4]
TENSORS |= {"d2t": IDS - np.arange(len(IDS)), "t2d": np.isin(np.arange(260), IDS)}


def head_of(target, mesh=None):
    config, _ = eagle_from_hf(MAPPING, "head", target, (0, 1, 2))
    mesh = mesh or one_device()
    place = lambda x, like: jax.device_put(jnp.asarray(x, jnp.float32), like.sharding)  # noqa: E731
    params = eagle.plain_params(MAPPING, TENSORS)
    params = jax.tree.map(place, params, abstract_eagle(config, mesh, jnp.float32))
    return Head(config, params, jnp.asarray(IDS, jnp.int32))


def two_letters(rng):
    letters = tuple(int(token) for token in rng.choice(IDS, 2, replace=False))
    return Sampling(temperature=float(rng.choice([0.0, 9.0])), allowed_ids=letters, logprobs=1)


def states_of(model, tokens):
    """The three hidden states [S, 3 D] of each token of a text, by one pass without a cache."""
    rows = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    arguments = model.config, model.params, rows, positions, jnp.ones_like(rows)
    out = jax.jit(forward, static_argnums=0, static_argnames="states")(*arguments, states=(0, 1, 2))
    return np.asarray(out.states[0], np.float64)


def guessed(monkeypatch):
    """What the engine's head guesses: by request, after so many tokens of the answer."""
    found = {}
    take = HeadDrafts.take

    def keep(self, guesses):
        take(self, guesses)
        for row in guesses.rows:
            found[row.request.id, len(row.answer)] = row.guesses

    monkeypatch.setattr(HeadDrafts, "take", keep)
    return found


@pytest.fixture
def always(monkeypatch):
    """Drafts in every step, whatever they cost."""
    monkeypatch.setattr("jaxmoe.generation.drafts.OVERHEAD", 1000)
    monkeypatch.setattr("jaxmoe.generation.drafts.WORTH", 0.0)
    monkeypatch.setattr(head_drafts, "GUESS", 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_guesses_are_those_of_numpy(llm_model, monkeypatch):
    """In rows that join late, read prompts in pieces and go on from a prefix, and after drafts."""
    rng, found = np.random.default_rng(5), guessed(monkeypatch)
    stem = rng.choice(LETTERS, 70).tolist()
    lengths = [45, 3, 1, 9, 2, 30]
    prompts = [rng.choice(LETTERS, n).tolist() for n in lengths]
    prompts[3:] = [stem + prompt for prompt in prompts[3:]]
    drawn = Sampling(temperature=9.0, allowed_ids=tuple(IDS.tolist()))
    requests = [Request(i, tuple(p), 14, drawn) for i, p in enumerate(prompts)]
    with jax.set_mesh(one_device()):
        done, _ = answers_of(
            llm_model.config, llm_model.params, requests, drafts=3, step_tokens=16, rows=3,
            head=head_of(llm_model.config),
        )  # fmt: skip
    table = np.asarray(llm_model.params["embed"])
    compared = 0
    for request in requests:
        text = [*request.tokens, *done[request.id].tokens]
        states = states_of(llm_model, text)
        for (id_, count), guesses in found.items():
            if id_ != request.id or count == 0 or not guesses:
                continue
            end = len(request.tokens) + count
            plain = eagle.Head(MAPPING, TENSORS, table)
            wanted, logits = plain.draft(text[1:end], states[: end - 1], 3, 0)
            margin = np.sort(logits, -1)
            if (margin[:, -1] - margin[:, -2]).min() > 1e-3:
                assert list(guesses) == wanted, (id_, count)
                compared += 1
    assert compared > 30
    assert (
        0 < sum(sum(x.accepted) for x in done.values()) < sum(sum(x.drafted) for x in done.values())
    )


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_answers_are_the_same(llm_model):
    rng = np.random.default_rng(0)
    with jax.set_mesh(one_device()):
        right, tried = compare(
            llm_model.config, llm_model.params, rng, count=6, drafts=3, settings=two_letters,
            head=head_of(llm_model.config),
        )  # fmt: skip
    assert 0 < right < tried


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_all_kinds_are_the_same(llm_model, rows):
    """With a head of random weights: drawn, penalized, with grammars, stop strings, bias."""
    rng, tried = np.random.default_rng(rows), 0
    with jax.set_mesh(one_device()):
        head = head_of(llm_model.config)
        for _ in range(TIMES * 5):
            tried += compare(
                llm_model.config, llm_model.params, rng, rows=rows, drafts=3, head=head
            )[1]
    assert tried


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("spec", "kv"),
    [(MESHES[0], "int8"), (MESHES[2], None), *with_more_workloads((MESHES[1], None))],
)
def test_answers_on_meshes_are_the_same(llm_model, spec, kv):
    """A prompt that is read in other pieces has other answers in int8: so all are read at first."""
    rng, right = np.random.default_rng(7), 0
    options = {"rows": 16, "kv": kv, "within": 1e-3, "waits": False} if kv else {"rows": 8}
    with jax.set_mesh(mesh_of(spec)):
        mesh = jax.sharding.get_mesh()
        params, head = llm_model.on(mesh), head_of(llm_model.config, mesh_of(spec))
        for settings in (two_letters, *[None] * TIMES):
            given = {"settings": settings} if settings else {}
            right += compare(
                llm_model.config, params, rng, count=7, drafts=3, head=head, **options, **given
            )[0]
    assert right


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_a_sequence_at_the_end_of_its_cache_begins_anew(llm_model, monkeypatch):
    monkeypatch.setattr(drafts, "PLACES", 24)
    requests = draw_requests(np.random.default_rng(2), 4, two_letters)
    places = []
    take = HeadDrafts.take

    def keep(self, guesses):
        take(self, guesses)
        places.extend(row.head_places for row in guesses.rows)

    monkeypatch.setattr(HeadDrafts, "take", keep)
    with jax.set_mesh(one_device()):
        head = head_of(llm_model.config)
        options = {"step_tokens": 8, "rows": 2}
        expected, _ = answers_of(llm_model.config, llm_model.params, requests, drafts=0, **options)
        found, engine = answers_of(
            llm_model.config, llm_model.params, requests, drafts=3, head=head, **options
        )
    check_same(found, expected)
    room = engine.head._places
    assert room < 40 < max(len(request.tokens) for request in requests)
    assert 0 < max(places) < room
    assert sum(sum(x.drafted) for x in found.values())


def test_nothing_is_guessed_where_all_rows_work(llm_model, monkeypatch):
    """Then steps are those without a head, and the first rows that are left begin anew."""
    calls = []
    monkeypatch.setattr(HeadDrafts, "_guess", lambda *_: calls.append(1))
    requests = [Request(i, tuple(LETTERS), 20, GREEDY) for i in range(8)]
    with jax.set_mesh(one_device()):
        answers_of(
            llm_model.config, llm_model.params, requests, rows=8, drafts=3,
            head=head_of(llm_model.config),
        )  # fmt: skip
    assert not calls


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_after_a_document(llm_model):
    """Which the head is not given: its sequences begin with the questions."""
    rng, found = np.random.default_rng(1), []
    requests = draw_requests(rng, 3, two_letters)
    config = dataclasses.replace(llm_model.config, max_position_embeddings=2048)
    params = llm_model.params
    text = rng.choice(LETTERS, 77).tolist()
    with jax.set_mesh(one_device()):
        for head in None, head_of(config):
            *_, document = read(config, params, new_document(config, params, 77 + 600), text)
            options = {"document": document, "tokenizer": TOKENIZER, "rows": 4, "head": head}
            stream = generate(config, params, requests, GREEDY, **options)
            found.append({x.request.id: x.completion for x in stream if x.finish_reason})
    check_same(found[1], found[0])
    assert sum(sum(x.accepted) for x in found[1].values())


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_about_pictures():
    """The head is given the image token in place of a picture's features."""
    model, rng = pictures.MODEL, np.random.default_rng(3)
    picture = open_picture(pictures.WIDE, pictures.SETTINGS, "x")
    seen = pictures.IDS.layout(picture.grid, pictures.SETTINGS.tokens_per_tile)
    requests = [
        Request(i, (*rng.choice(60, 9).tolist(), *seen), 20, GREEDY, pictures=(picture,))
        for i in range(2)
    ]
    mapping = eagle.head_config(vocab_size=model.vocab_size, draft_vocab_size=40)
    mapping["hidden_size"] = model.hidden_size
    tensors = eagle.head_tensors(mapping, 7)
    config, _ = eagle_from_hf(mapping, "head", model, (0, 1, 2))
    params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), eagle.plain_params(mapping, tensors)
    )
    head = Head(config, params, jnp.asarray(eagle.target_ids(tensors), jnp.int32))
    with jax.set_mesh(one_device()):
        weights = pictures.random_params()
        expected, _ = answers_of(model, weights, requests, drafts=0, step_tokens=64)
        found, _ = answers_of(model, weights, requests, drafts=3, step_tokens=64, head=head)
    check_same(found, expected)
    assert sum(sum(x.drafted) for x in found.values())


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_beside_adapters(llm_model):
    """Answers of rows with adapters of their own are those without a head."""
    config, rng = llm_model.config, np.random.default_rng(4)
    abstract = abstract_adapters(
        config, one_device(), {"layers.0.attention.q": 4, "layers.1.attention.o": 4}
    )
    pairs = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)
    both = ("first", "second"), (2, 2), (0.5, 1.5)
    adapters = {name: Adapters(*pair, *both) for name, pair in pairs.items()}
    params = with_adapters(config, llm_model.params, adapters)
    names = *both[0], None, "first"
    drawn = draw_requests(rng, len(names), two_letters)
    requests = [dataclasses.replace(x, adapter=y) for x, y in zip(drawn, names, strict=True)]
    with jax.set_mesh(one_device()):
        expected, _ = answers_of(config, params, requests, drafts=0)
        found, _ = answers_of(config, params, requests, drafts=3, head=head_of(config))
    check_same(found, expected)
    assert sum(sum(x.accepted) for x in found.values())


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_a_head_that_guesses_badly_is_told_of(llm_model, monkeypatch):
    monkeypatch.setattr(head_drafts, "ENOUGH", 10)
    letters = tuple(sorted({*range(97, 123)} - {int(x) for x in LETTERS}))[:3]
    requests = [Request(0, (97, 98), 30, dataclasses.replace(GREEDY, allowed_ids=letters))]
    with jax.set_mesh(one_device()), pytest.warns(UserWarning, match="0.0% are right"):
        done, engine = answers_of(
            llm_model.config, llm_model.params, requests, drafts=3, head=head_of(llm_model.config)
        )
    assert engine.head.judged[0] >= 10 and engine.head.right == [0, 0, 0]
    assert sum(done[0].accepted) == 0


def test_no_head_without_drafts(llm_model):
    with pytest.raises(UserError, match="no drafts on tpu"):
        drafts_for(llm_model.config, "tpu", None, has_head=True)
    assert drafts_for(llm_model.config, "gpu", None, has_head=True) == 3
    with pytest.warns(UserWarning, match="at most 3 on gpu"):
        assert drafts_for(llm_model.config, "gpu", 5) == 3
    requests = [Request(0, (1, 2), 3, GREEDY)]
    with jax.set_mesh(one_device()):
        head = head_of(llm_model.config)
        engine = Engine(llm_model.config, llm_model.params, requests, drafts=0, head=head)
    assert engine.head is None
