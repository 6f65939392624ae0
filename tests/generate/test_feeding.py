"""Requests that come while others run get the answers that they get together."""

import jax
import numpy as np
import pytest

from jaxmoe.generation import features
from jaxmoe.generation.engine import Engine, generate
from jaxmoe.generation.feeding import generate_from
from jaxmoe.generation.request import Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.images import open_picture
from jaxmoe.mesh import MeshConfig
from tests.conftest import one_device
from tests.generate.pictures import IDS, MODEL, SETTINGS, SMALL, WIDE, noise, random_params
from tests.tiers import slow_after_first

GREEDY = Sampling(temperature=0.0)
PLAIN = {"seed": 3, "temperature": 1.0}
ASKED = [  # what each part asks for that those before do not
    GREEDY,
    Sampling(**PLAIN),
    Sampling(**PLAIN, top_p=0.9, logprobs=2),
    Sampling(**PLAIN, frequency_penalty=1.0, logit_bias=((5, 2.0),), prompt_logprobs=1),
]


def draw(rng, count):
    return tuple(rng.integers(0, 120, count).tolist())


def parts_of(shared):
    """Four parts of five requests, which begin alike and grow beyond the cache of the first."""
    rng = np.random.default_rng(0)
    return [
        [Request(f"{i} {j}", (*shared, *draw(rng, 3 + 40 * i)), 4 + j, asked) for j in range(5)]
        for i, asked in enumerate(ASKED)
    ]


def answers_of(stream):
    ended = [token.completion for token in stream if token.finish_reason]
    found = {done.request.id: done for done in ended}
    assert len(found) == len(ended), "an answer twice"
    return found


def check_same(found, expected):
    """Tokens are equal, and log-probabilities within rounding: steps have other shapes."""
    assert found.keys() == expected.keys()
    for done, other in ((found[id_], expected[id_]) for id_ in expected):
        assert (done.tokens, done.finish_reason) == (other.tokens, other.finish_reason)
        assert logprobs_of(done) == pytest.approx(logprobs_of(other), abs=1e-5)


def logprobs_of(done):
    return [own.logprob for own in (*(done.prompt_logprobs or ()), *(done.logprobs or ()))]


@pytest.mark.parametrize("mesh", slow_after_first([None, "data=2,expert=2,tensor=2"]))
def test_parts_answer_as_the_whole_does(small, mesh):
    """Each part asks for more: drawn tokens, log-probabilities, penalties, a longer cache."""
    mesh = MeshConfig.parse(mesh).make() if mesh else one_device()
    parts = parts_of(draw(np.random.default_rng(1), 70))
    left, idle = [*parts, []], []

    def more(waits):
        idle.append(waits)
        return left.pop(0) if left else []

    params, options = small.on(mesh), {"rows": 3, "step_tokens": 32, "cache_tokens": 1024}
    with jax.set_mesh(mesh):
        fed = answers_of(generate_from(small.config, params, more, stop_ids=(), **options))
        whole = [request for part in parts for request in part]
        at_once = answers_of(generate(small.config, params, whole, GREEDY, stop_ids=(), **options))
    check_same(fed, at_once)
    assert not left
    assert idle[0] and idle[-1]
    assert not all(idle)  # asked before rows were idle


def test_a_prefix_is_read_once_for_all_parts(small):
    """The second part goes on from the row that the first has read."""
    shared = draw(np.random.default_rng(1), 300)
    parts = [part[:3] for part in parts_of(shared)[:2]]
    with jax.set_mesh(one_device()):
        first = parts.pop(0)
        own = {"rows": 4, "step_tokens": 32, "stop_ids": (), "grows": True}
        engine = Engine(small.config, small.params, [*first, *parts[0]], **own)
        together = answers_of(engine.run())
        fed = Engine(small.config, small.params, first, **own)
        apart = answers_of(fed.run(more=lambda: parts.pop() if parts else []))
    check_same(apart, together)
    assert fed.tokens - engine.tokens < 20  # what begins alike in one part alone


@pytest.mark.parametrize("cache_tokens", [None, 1024])
def test_a_cache_has_room_for_slightly_longer_requests(small, cache_tokens):
    with jax.set_mesh(one_device()):
        own = {"rows": 2, "grows": True, "cache_tokens": cache_tokens}
        engine = Engine(small.config, small.params, [Request("a", (1,), 2, GREEDY)], **own)
        assert engine.fits(Request("b", (1,) * 900, 2, GREEDY))


def test_pictures_come_and_are_forgotten():
    """First in a later part; one is shown again after it was forgotten, and numbers begin anew."""
    wide, small = (open_picture(image, SETTINGS, "x") for image in (WIDE, SMALL))
    show = {x: tuple(IDS.layout(x.grid, SETTINGS.tokens_per_tile)) for x in (wide, small)}
    shown = [(), (wide,), (small, wide), (small,), (wide,), (small, small)]
    parts = [
        [Request(f"{i}", (5, *(t for x in own for t in show[x]), 7), 4, GREEDY, pictures=own)]
        for i, own in enumerate(shown)
    ]
    with jax.set_mesh(one_device()):
        own = {"rows": 2, "stop_ids": ()}
        whole = [request for part in parts for request in part]
        expected = answers_of(generate(MODEL, random_params(), whole, GREEDY, **own))
        engine = Engine(MODEL, random_params(), parts.pop(0), **own, grows=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "LARGEST", MODEL.vocab_size + 5 * SETTINGS.tokens_per_tile)
            found = answers_of(engine.run(more=lambda: parts.pop(0) if parts else []))
    check_same(found, expected)
    assert engine._references is not None
    assert not engine._references._tiles and not engine._references._users


def test_a_picture_that_stays_keeps_its_references(monkeypatch):
    """Also when references are used up and the first ones are given again."""
    with jax.set_mesh(one_device()):
        table = features.FeatureTable(MODEL, random_params())
    each = table.tokens_per_tile
    monkeypatch.setattr(features, "LARGEST", MODEL.vocab_size + 12 * each)
    references = features.References(MODEL, table)
    pictures = [open_picture(noise(seed), SETTINGS, "it") for seed in range(20)]

    def seen(picture):
        tokens = [IDS.patch] * picture.num_features
        return set(references.of("it", tokens, [picture]).tolist())

    stays = seen(pictures[0])
    for picture in pictures[1:]:
        assert not seen(picture) & stays
        references.release([picture])
    assert seen(pictures[0]) == stays


def test_told_to_stop_it_asks_for_no_more(small):
    parts = parts_of(())[:2]
    steps = iter([False] * 3 + [True] * 9)
    with jax.set_mesh(one_device()):
        stream = generate_from(
            small.config,
            small.params,
            lambda waits: parts.pop(0)[:1],
            rows=1,
            stop_ids=(),
            stop=lambda: next(steps),
        )
        assert len(list(stream)) < 4
    assert len(parts) == 0  # one in work and one that waits
