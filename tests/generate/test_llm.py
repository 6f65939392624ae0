"""jaxmoe.LLM: what it answers is what the engine gives, in every form, and mistakes are results."""

import asyncio
import dataclasses
import json

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

import jaxmoe
from jaxmoe import LLM, Grammar, Request, Sampling, UserError
from jaxmoe.generation.request import expand, fit_context
from jaxmoe.text import render
from tests import reference
from tests.generate.conftest import CONTEXT, TOKENIZER

PROMPTS = ["the rain", [256, 104, 105], "in the plain"]
CHAT = [{"role": "user", "content": "Hi"}]
DRAWN = Sampling(temperature=1.0, top_p=1.0, seed=4)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["rain", "plain"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def engine(llm, prompts, sampling=None, n=1, max_new_tokens=12):
    """The engine's own answers to prompts of tokens, in their order, as completions."""
    requests = [
        fit_context(llm.config, one)
        for i, tokens in enumerate(prompts)
        for one in expand(Request(str(i), tuple(tokens), max_new_tokens), n)
    ]
    done = {}
    with jax.set_mesh(llm.mesh):
        for token in jaxmoe.generate(
            llm.config,
            llm.params,
            requests,
            sampling or llm.sampling,
            rows=4,
            stop_ids=(259,),
            tokenizer=TOKENIZER,
        ):
            done[token.request.id] = token.completion
    return [done[request.id] for request in requests]


def encoded(prompts):
    return [TOKENIZER.encode(x, bos=True) if isinstance(x, str) else x for x in prompts]


# Whole answers


@pytest.mark.parametrize("n", [1, 2])
def test_answers_are_the_engines_in_the_order_of_the_prompts(llm, n):
    sampling = dataclasses.replace(DRAWN, logprobs=2, prompt_logprobs=1)
    results = llm.generate(PROMPTS, sampling, max_new_tokens=12, n=n)
    expected = engine(llm, encoded(PROMPTS), sampling, n)
    assert [result.record for result in results] == [one.record() for one in expected]
    for result, one in zip(results, expected, strict=True):
        assert (result.id, result.text) == (one.request.id, one.text)
        assert list(result.tokens) == one.tokens and result.finish_reason == one.finish_reason
        assert result.logprobs == tuple(one.logprobs) and result.error is None
        assert result.prompt_logprobs == (None, *one.prompt_logprobs)
        assert result.prompt_tokens == one.request.tokens
        assert result.usage["completion_tokens"] == one.count


@pytest.mark.parametrize("given", ["the rain", [256, 104, 105], np.array([256, 104, 105])])
def test_one_prompt_is_a_list_of_one_result(llm, given):
    (result,) = llm.generate(given, DRAWN, max_new_tokens=4)
    assert [result] == llm.generate([given], DRAWN, max_new_tokens=4)
    assert result.id == "0" and len(result.tokens) == 4


def test_prompts_may_be_the_rows_of_an_array(llm):
    rows = jnp.array([[256, 104], [256, 105]])
    results = llm.generate(rows, DRAWN, max_new_tokens=2)
    assert [result.prompt_tokens for result in results] == [(256, 104), (256, 105)]


def test_no_prompts_are_no_results(llm):
    assert llm.generate([]) == [] and list(llm.stream([])) == []


def test_chats_are_rendered(llm):
    conversations = [CHAT, [{"role": "system", "content": "Be kind."}, *CHAT]]
    tools = [{"name": "f"}]
    results = llm.chat(conversations, DRAWN, tools=tools, max_new_tokens=4)
    prompts = [render(one, TOKENIZER, tools) for one in conversations]
    assert [result.prompt_tokens for result in results] == list(map(tuple, prompts))
    assert [list(r.tokens) for r in results] == [
        one.tokens for one in engine(llm, prompts, DRAWN, max_new_tokens=4)
    ]
    (alone,) = llm.chat(CHAT, DRAWN, max_new_tokens=4)
    assert alone.prompt_tokens == tuple(render(CHAT, TOKENIZER))


def test_answers_of_one_prompt_differ_and_come_again(llm):
    first = llm.generate("the", DRAWN, max_new_tokens=8, n=3)
    assert [result.id for result in first] == ["0#0", "0#1", "0#2"]
    assert len({result.tokens for result in first}) == 3
    assert llm.generate("the", DRAWN, max_new_tokens=8, n=3) == first
    assert llm.generate("the", dataclasses.replace(DRAWN, seed=5), max_new_tokens=8, n=3) != first


def test_each_prompt_may_have_its_own_settings(llm):
    """Catches a batch that draws by the settings of one of its requests."""
    samplings = [Sampling(temperature=0.0), DRAWN, dataclasses.replace(DRAWN, seed=9)]
    mixed = llm.generate(["the"] * 3, samplings, max_new_tokens=8)
    for sampling, result in zip(samplings, mixed, strict=True):
        alone = llm.generate(["the"] * 3, sampling, max_new_tokens=8)
        assert result == alone[int(result.id)]
    assert len({result.tokens for result in mixed}) == 3


def test_the_default_settings_are_the_checkpoints(llm_model, llm, tmp_path):
    assert llm.sampling == Sampling()
    greedy = LLM.from_parts(
        llm.config, llm.params, TOKENIZER, sampling=Sampling(temperature=0.0), rows=4
    )
    expected = engine(llm, encoded(PROMPTS), Sampling(temperature=0.0))
    results = greedy.generate(PROMPTS, max_new_tokens=12)
    assert [list(result.tokens) for result in results] == [one.tokens for one in expected]
    (drawn,) = greedy.generate("the rain", DRAWN, max_new_tokens=12)
    assert list(drawn.tokens) != expected[0].tokens


def test_any_mesh_gives_the_same(llm_model, llm):
    """The default one has as little of the model on each device as its sizes allow."""
    spread = LLM(llm_model.checkpoint, rows=4)
    assert dict(spread.mesh.shape) == {
        "data": 1,
        "fsdp": 1,
        "expert": 2,
        "sequence": 1,
        "tensor": 4,
    }
    options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 8}
    assert [r.tokens for r in spread.generate(PROMPTS, **options)] == [
        r.tokens for r in llm.generate(PROMPTS, **options)
    ]
    named = LLM.from_parts(llm.config, llm_model.on(jaxmoe.MeshConfig.parse("fsdp=8").make()))
    assert named.mesh.shape["fsdp"] == 8


# Settings end to end


def test_a_stop_string_cuts_text_tokens_and_logprobs_at_one_place(llm):
    sampling = dataclasses.replace(DRAWN, logprobs=0)
    (whole,) = llm.generate("the rain", sampling, max_new_tokens=40)
    stop = next(
        TOKENIZER.decode(whole.tokens[i : i + 2])
        for i in range(5, 38)
        if all(32 <= token < 94 for token in whole.tokens[i : i + 2])
    )
    (cut,) = llm.generate(
        "the rain", dataclasses.replace(sampling, stop=(stop,)), max_new_tokens=40
    )
    assert cut.text == whole.text[: whole.text.index(stop)] != whole.text
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert TOKENIZER.decode(cut.tokens) == cut.text and len(cut.logprobs) == len(cut.tokens)
    assert cut.usage["completion_tokens"] == len(cut.tokens) + len(stop)
    pieces = list(
        llm.stream("the rain", dataclasses.replace(sampling, stop=(stop,)), max_new_tokens=40)
    )
    assert "".join(piece.text for piece in pieces) == cut.text


def test_answers_follow_a_json_schema(llm):
    sampling = dataclasses.replace(DRAWN, grammar=Grammar("json_schema", json.dumps(SCHEMA)))
    results = llm.generate(["{", "a name"], sampling, max_new_tokens=120, n=4)
    done = [result for result in results if result.finish_reason == "stop"]
    assert len(done) > 4 and len({result.text for result in done}) > 2
    for result in done:
        jsonschema.validate(json.loads(result.text), SCHEMA)
        assert result.warning is None
    (short,) = llm.generate("{", sampling, max_new_tokens=3)
    assert short.finish_reason == "length" and "incomplete" in short.warning


# Scores


def test_scores_are_those_of_the_reference(llm_model, llm):
    texts = ["the rain in the plain", [256, 1, 2, 3], "a"]
    scores = llm.score(texts, top=2)
    for tokens, score in zip(encoded(texts), scores, strict=True):
        logits = reference.logits(llm_model.hf_config, llm_model.tensors, [tokens])[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [log_p[i, token] for i, token in enumerate(tokens[1:])]
        found = [one.logprob for one in score.logprobs[1:]]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(
            [score.total, score.mean], [sum(expected), np.mean(expected)], atol=1e-3
        )
        assert score.tokens == tuple(tokens) and score.logprobs[0] is None
        assert [one.token for one in score.logprobs[1:]] == tokens[1:]
        for row, one in zip(log_p, score.logprobs[1:], strict=False):
            assert [token for token, _ in one.top] == np.argsort(-row)[:2].tolist()


def test_a_text_that_nothing_predicts_has_no_score(llm):
    good, empty = llm.score(["a", ""])
    assert good.error is None and "single token" in empty.error and np.isnan(empty.mean)
    with pytest.raises(UserError, match="single token"):
        llm.score("")


# Pieces


def test_pieces_make_up_the_results(llm):
    results = llm.generate(PROMPTS, DRAWN, max_new_tokens=12, n=2)
    pieces = list(llm.stream(PROMPTS, DRAWN, max_new_tokens=12, n=2))
    order = [piece.index for piece in pieces]
    assert order != sorted(order), "they are interleaved"
    for index, result in enumerate(results):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == result.text
        assert sum((piece.tokens for piece in own), ()) == result.tokens
        assert [piece.result for piece in own] == [None] * (len(own) - 1) + [result]
        assert own[-1].finish_reason == result.finish_reason


def test_streams_interleave_and_leave_the_mesh_alone(llm):
    """Catches a lock, or a current mesh, that is held while the consumer does something else."""
    before = jax.sharding.get_abstract_mesh()
    expected = llm.generate("the rain", DRAWN, max_new_tokens=6)
    first, second = (llm.stream("the rain", DRAWN, max_new_tokens=6) for _ in range(2))
    found = [(next(first), next(second)) for _ in range(3)]
    assert jax.sharding.get_abstract_mesh() == before
    assert llm.generate("the rain", DRAWN, max_new_tokens=6) == expected
    for left in (first, second):
        *_, last = left
        assert last.result == expected[0]
    assert found[0][0] == found[0][1]


def test_a_chat_streams(llm):
    (result,) = llm.chat(CHAT, DRAWN, max_new_tokens=5)
    *_, last = llm.chat_stream(CHAT, DRAWN, max_new_tokens=5)
    assert last.result == result


# Mistakes


def test_a_bad_prompt_refuses_no_other(llm):
    long = [1] * CONTEXT
    prompts = ["the", long, 7, "rain", [300], ""]
    results = llm.generate([*prompts, []], DRAWN, max_new_tokens=4)
    errors = [result.error for result in results]
    assert [error is None for error in errors] == [True, False, False, True, False, True, False]
    assert f"{CONTEXT} tokens" in errors[1] and "7 is neither text" in errors[2]
    assert "token 300" in errors[4] and "no tokens" in errors[6]
    for result in results:
        if result.error:
            assert (result.text, result.tokens, result.finish_reason) == ("", (), "error")
            assert result.record == {"id": result.id, "error": result.error}
    good = [piece for piece in llm.stream(prompts, DRAWN, max_new_tokens=4) if piece.result]
    assert {piece.index: piece.result for piece in good} == dict(enumerate(results[:-1]))


def test_equal_answers_refuse_their_prompt_only(llm):
    samplings = [DRAWN, Sampling(temperature=0.0)]
    results = llm.generate(["a", "b"], samplings, max_new_tokens=2, n=2)
    assert [result.id for result in results] == ["0#0", "0#1", "1#0", "1#1"]
    assert [bool(result.error) for result in results] == [False, False, True, True]


def test_settings_that_cannot_be_served_refuse_their_prompt_only(llm):
    bare = LLM.from_parts(llm.config, llm.params, rows=4, cache_tokens=64)
    samplings = [DRAWN, Sampling(stop=("a",)), Sampling(grammar=Grammar("regex", "a")), DRAWN]
    samplings += [Sampling(min_tokens=9), DRAWN]
    prompts = [[1, 2], [1], [1], "text", [1], [1] * 63]
    results = bare.generate(prompts, samplings, max_new_tokens=4)
    assert len(results[0].tokens) == 4 and results[0].text == ""
    with pytest.raises(UserError, match="no tokenizer"):
        bare.tokenizer.encode("a")
    words = ["no tokenizer", "no tokenizer", "no tokenizer", "at least 9", "room for 64"]
    for result, word in zip(results[1:], words, strict=True):
        assert word in result.error and "\n" not in result.error


def test_logits_that_are_not_finite_are_an_error(llm):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), llm.params)
    broken = LLM.from_parts(llm.config, params, TOKENIZER, rows=4)
    with pytest.raises(UserError, match="not finite"):
        broken.generate("a", max_new_tokens=2)
    with pytest.raises(UserError, match=r"not finite.*All 2 have failed"):
        list(broken.stream(["a", "b"], max_new_tokens=2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate([1] * CONTEXT), f"{CONTEXT} tokens"),
        (lambda llm: llm.generate([5, "\ud83d"]), "token.*|surrogate"),
        (lambda llm: llm.generate([None, 5.0]), "None is neither.*All 2 have failed"),
        (lambda llm: llm.generate(5), "5 cannot be used; give a list of prompts"),
        (lambda llm: llm.generate(b"a"), "b'a' cannot be used"),
        (lambda llm: llm.generate("a", [DRAWN, DRAWN]), "2 settings of sampling for 1 prompts"),
        (lambda llm: llm.generate("a", {"seed": 1}), "settings, or one jaxmoe.Sampling"),
        (lambda llm: llm.generate(["a"], ["greedy"]), "sampling 'greedy' is no jaxmoe.Sampling"),
        (lambda llm: llm.generate("a", max_new_tokens=0), "max_new_tokens 0 is not"),
        (lambda llm: llm.generate("a", max_new_tokens=1.5), "max_new_tokens 1.5 is not"),
        (lambda llm: llm.generate("a", n=0), "n 0 is not"),
        (lambda llm: llm.generate("a", Sampling(temperature=0.0), n=2), "equal answers"),
        (lambda llm: llm.chat("Hi"), "'Hi' cannot be used; give a list of messages"),
        (lambda llm: llm.chat([]), "at least one message"),
        (lambda llm: llm.chat([{"role": "poet", "content": "a"}]), r"messages\[0\].*role"),
        (lambda llm: llm.score("a", top=99), "prompt_logprobs 99"),
        (lambda llm: llm.stream([1] * CONTEXT), f"{CONTEXT} tokens"),
        (lambda llm: asyncio.run(llm.agenerate([1] * CONTEXT)), f"{CONTEXT} tokens"),
        (lambda llm: llm.generate("a", document="nowhere"), "nowhere"),
        (lambda llm: LLM("nowhere"), "nowhere"),
        (lambda llm: LLM.from_parts(llm.config, llm.params, rows=0), "rows 0"),
    ],
)
def test_a_mistake_is_one_sentence(llm, untyped, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(llm)
    assert "\n" not in str(caught.value)


def test_a_saved_document_comes_before_each_prompt(llm, tmp_path):
    text = TOKENIZER.encode("the rain in the plain", bos=True)
    with jax.set_mesh(llm.mesh):
        list(jaxmoe.read_document(llm.config, llm.params, text, tmp_path / "document"))
    prompts = [" and", [33, 34], "x" * (CONTEXT - 12)]
    results = llm.generate(
        prompts, Sampling(temperature=0.0), max_new_tokens=6, document=tmp_path / "document"
    )
    whole = [text + TOKENIZER.encode(" and"), [*text, 33, 34]]
    expected = llm.generate(whole, Sampling(temperature=0.0), max_new_tokens=6)
    assert [r.tokens for r in results[:2]] == [r.tokens for r in expected]
    assert "no room" in results[2].error
