"""Settings of requests: from Python, and as keys of a line; what is wrong is named."""

import json

import jax
import numpy as np
import pytest

from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.generation.answers import Answers, job_digest
from jaxmoe.generation.completion import Completion, CompletionToken
from jaxmoe.generation.grammar import Grammar
from jaxmoe.generation.jobs import Refusal, finished, read_requests
from jaxmoe.generation.request import Request, expand, fit_context
from jaxmoe.generation.request_keys import KEYS
from jaxmoe.generation.sampling import RepetitionDetection, Sampling
from tests.small_tokenizers import byte_tokenizer

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}}
REPETITION = RepetitionDetection(max_pattern_size=4, min_pattern_size=2, min_count=3)


@pytest.fixture
def jobs(tmp_path):
    return tmp_path / "jobs.jsonl"


@pytest.fixture
def read(jobs):
    """The requests of lines; each is given as its keys beside id and tokens."""

    def read(*lines, tokenizer=None, **arguments):
        records = [{"id": f"{i}", "tokens": [1, 2], **line} for i, line in enumerate(lines)]
        jobs.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_requests(jobs, tokenizer or byte_tokenizer(), 9, **arguments)

    return read


VALUES = [
    ({"temperature": 1}, {"temperature": 1.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 7}, {"top_k": 7}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.1}, {"min_p": 0.1}),
    ({"seed": 5}, {"seed": 5}),
    ({"stop": "a"}, {"stop": ("a",)}),
    ({"stop": ["a", "\u00e9"]}, {"stop": ("a", "\u00e9")}),
    ({"stop_token_ids": [3]}, {"stop_ids": (3,)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"min_tokens": 2}, {"min_tokens": 2}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    ({"logit_bias": {"7": -100, "8": 1.5}}, {"logit_bias": ((7, -100.0), (8, 1.5))}),
    ({"allowed_token_ids": [4, 5]}, {"allowed_ids": (4, 5)}),
    ({"logprobs": 0}, {"logprobs": 0}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    ({"logprobs": False}, {"logprobs": None}),
    ({"prompt_logprobs": 1}, {"prompt_logprobs": 1}),
    ({"include_stop_str_in_output": True}, {"include_stop_in_output": True}),
    ({"response_format": {"type": "text"}}, {"grammar": None}),
    ({"response_format": {"type": "json_object"}}, {"grammar": Grammar("json_object")}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"grammar": Grammar("json_schema", json.dumps(SCHEMA))},
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"grammar": Grammar("json_schema", json.dumps(SCHEMA))},
    ),
    (
        {"structured_outputs": {"json": '{"type": "null"}'}, "response_format": {"type": "text"}},
        {"grammar": Grammar("json_schema", '{"type": "null"}')},
    ),
    ({"structured_outputs": {"regex": "a+"}}, {"grammar": Grammar("regex", "a+")}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"grammar": Grammar("choice", '["a", "b"]')}),
    (
        {"structured_outputs": {"grammar": 'start: "a"'}},
        {"grammar": Grammar("lark", 'start: "a"')},
    ),
    ({"structured_outputs": {"json_object": True}}, {"grammar": Grammar("json_object")}),
    (
        {
            "repetition_detection": {
                "max_pattern_size": 4,
                "min_pattern_size": 2,
                "min_count": 3,
            }
        },
        {"repetition_detection": REPETITION},
    ),
    (
        {"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 0, "min_count": 3}},
        {"repetition_detection": RepetitionDetection(max_pattern_size=4, min_count=3)},
    ),
    ({"repetition_detection": {"max_pattern_size": 0}}, {"repetition_detection": None}),
]


@pytest.mark.parametrize(("line", "fields"), VALUES)
def test_a_key_is_a_setting(read, line, fields):
    default = Sampling(temperature=0.25, top_p=0.75, seed=9, logprobs=3)
    (request,) = read(line, default=default)
    expected = {**vars(default), **fields}
    assert vars(request.sampling) == expected and request.sampling == Sampling(**expected)
    assert hash(request.sampling) == hash(Sampling(**expected))


def test_every_key_is_tried():
    of_requests = {"max_tokens", "max_completion_tokens", "max_new_tokens", "n", "adapter"}
    assert {key for line, _ in VALUES for key in line} == set(KEYS) - of_requests


def test_a_line_without_settings_has_the_runs(read):
    """So has one whose settings are null, as clients write those that they leave out."""
    lines = read({}, dict.fromkeys(KEYS), default=Sampling(temperature=0.5))
    assert [request.sampling for request in lines] == [None, None]
    assert [request.max_new_tokens for request in lines] == [9, 9]


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_a_line_may_say_how_long_its_answer_is(read, key):
    assert [request.max_new_tokens for request in read({key: 3}, {})] == [3, 9]


def test_several_answers_are_several_requests(read):
    requests = read({"n": 1}, {"n": 3, "seed": 4})
    assert [request.id for request in requests] == ["0", "1#0", "1#1", "1#2"]
    assert {request.sampling for request in requests[1:]} == {Sampling(seed=4)}
    assert expand(Request(7, (1,), 2), 2) == [Request("7#0", (1,), 2), Request("7#1", (1,), 2)]
    assert expand(Request(7, (1,), 2), 1) == [Request(7, (1,), 2)]


def test_ids_of_several_answers_differ_from_those_of_other_lines(read):
    first, second, refusal = read({"n": 2}, {"id": "0#1"})
    assert (first.id, second.id, refusal.id) == ("0#0", "0#1", "0#1")
    assert "has the id '0#1' of line 1" in refusal.error
    other, refusal = read({"id": "1#1"}, {"n": 2})
    assert other.id == "1#1" and refusal.id == "1" and "'1#1' of line 1" in refusal.error


BAD = [
    ({"temperature": -1}, ["temperature -1", "use 0 for greedy"]),
    ({"temperature": "hot"}, ["temperature 'hot'"]),
    ({"temperature": True}, ["temperature True"]),
    ({"top_p": 0}, ["top_p 0"]),
    ({"top_p": 1.1}, ["top_p 1.1"]),
    ({"top_k": -2}, ["top_k -2"]),
    ({"top_k": 1.5}, ["top_k 1.5"]),
    ({"min_p": 2}, ["min_p 2"]),
    ({"seed": -1}, ["seed -1"]),
    ({"seed": 2**31}, ["seed 2147483648"]),
    ({"stop": ""}, ["stop holds ''"]),
    ({"stop": ["a", 1]}, ["stop holds 1"]),
    ({"stop": {"a": 1}}, ["stop {'a': 1} is no list of texts"]),
    ({"stop": "\ud83d"}, ["stop", "surrogate"]),
    ({"stop_token_ids": 5}, ["stop_token_ids: stop_ids 5 is no list"]),
    ({"stop_token_ids": [-1]}, ["stop_token_ids", "-1"]),
    ({"stop_token_ids": ["5"]}, ["stop_token_ids", "'5'"]),
    ({"ignore_eos": 1}, ["ignore_eos 1"]),
    ({"min_tokens": -1}, ["min_tokens -1"]),
    ({"repetition_penalty": 0}, ["repetition_penalty 0"]),
    ({"presence_penalty": 3}, ["presence_penalty 3"]),
    ({"frequency_penalty": -2.5}, ["frequency_penalty -2.5"]),
    ({"logit_bias": {"a": 1}}, ["logit_bias {'a': 1}"]),
    ({"logit_bias": {"\u0661": 1}}, ["logit_bias"]),
    ({"logit_bias": [[1, 2]]}, ["logit_bias [[1, 2]]"]),
    ({"logit_bias": {"1": 101}}, ["logit_bias gives token 1 101"]),
    ({"logit_bias": {"1": "x"}}, ["logit_bias gives token 1 'x'"]),
    ({"logit_bias": {"1": 1, "01": 2}}, ["logit_bias names a token twice"]),
    ({"allowed_token_ids": []}, ["allowed_token_ids", "holds no token"]),
    ({"allowed_token_ids": [1.5]}, ["allowed_token_ids", "1.5"]),
    ({"logprobs": 21}, ["logprobs 21"]),
    ({"logprobs": "all"}, ["logprobs 'all'"]),
    ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs: logprobs 21"]),
    ({"logprobs": True, "top_logprobs": ""}, ["top_logprobs: logprobs ''"]),
    ({"top_logprobs": 2}, ['top_logprobs needs "logprobs": true']),
    ({"logprobs": 2, "top_logprobs": 2}, ['top_logprobs needs "logprobs": true']),
    ({"prompt_logprobs": -1}, ["prompt_logprobs -1"]),
    ({"include_stop_str_in_output": "no"}, ["include_stop_str_in_output", "'no'"]),
    ({"max_tokens": 0}, ["max_tokens 0"]),
    ({"max_completion_tokens": 1.5}, ["max_completion_tokens 1.5"]),
    ({"max_tokens": 1, "max_new_tokens": 1}, ["max_tokens and max_new_tokens mean the same"]),
    ({"n": 0}, ["n 0"]),
    ({"n": 10**6}, ["n 1000000"]),
    ({"n": 2, "temperature": 0}, ["n asks for equal answers"]),
    ({"response_format": "json"}, ["response_format 'json' is no object"]),
    ({"response_format": {}}, ["response_format has the type None"]),
    ({"response_format": {"type": "yaml"}}, ["response_format has the type 'yaml'"]),
    ({"response_format": {"type": "text", "x": 1}}, ["response_format has the unknown key 'x'"]),
    ({"response_format": {"type": "json_schema"}}, ["response_format", "need each other"]),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, ["no schema"]),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        ["response_format: the json_schema cannot be used", '"not"'],
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"skema": {}}}},
        ["response_format's json_schema has the unknown key 'skema'"],
    ),
    ({"structured_outputs": {}}, ["structured_outputs must hold exactly one"]),
    ({"structured_outputs": {"regex": "a", "json": {}}}, ["exactly one"]),
    ({"structured_outputs": {"structural_tag": "a"}}, ["unknown key 'structural_tag'"]),
    ({"structured_outputs": {"regex": 5}}, ["structured_outputs has the regex 5"]),
    ({"structured_outputs": {"regex": "("}}, ["structured_outputs: the regex", "unclosed"]),
    ({"structured_outputs": {"choice": []}}, ["structured_outputs: the choice"]),
    ({"structured_outputs": {"choice": "ab"}}, ["structured_outputs: the choice"]),
    ({"structured_outputs": {"json_object": 1}}, ["json_object 1, which is not true"]),
    ({"structured_outputs": {"json": 5}}, ["structured_outputs has no schema"]),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        ["response_format and structured_outputs contradict"],
    ),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, ["ignore_eos may forbid"]),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, ["min_tokens may forbid"]),
    ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [1]}, ["allowed_ids may forbid"]),
    ({"repetition_detection": 3}, ["repetition_detection 3 is no object"]),
    ({"repetition_detection": {"size": 3}}, ["repetition_detection has the unknown key 'size'"]),
    ({"repetition_detection": {"max_pattern_size": 3}}, ["repetition_detection: min_count 0"]),
    (
        {"repetition_detection": {"max_pattern_size": 9999, "min_count": 2}},
        ["repetition_detection: max_pattern_size 9999"],
    ),
    (
        {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}},
        ["repetition_detection: min_pattern_size 3 is above"],
    ),
    ({"top_q": 1}, ["unknown key 'top_q'"]),
    ({"bad_words": ["a"]}, ["unknown key 'bad_words'"]),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_a_bad_key_is_named_and_refuses_no_other_line(read, jobs, line, words):
    first, refusal, last = read({}, line, {"seed": 1})
    assert isinstance(refusal, Refusal) and refusal.id == "1"
    assert refusal.error.startswith(f"{jobs} line 2") and "\n" not in refusal.error
    assert all(word in refusal.error for word in words), refusal.error
    assert (first.sampling, last.sampling) == (None, Sampling(seed=1))


def test_stop_strings_need_a_tokenizer(jobs):
    jobs.write_text('{"id": 1, "tokens": [1], "stop": "a"}\n')
    with pytest.raises(UserError, match="line 1 has stop strings, but the checkpoint has no tok"):
        read_requests(jobs, None, 9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": None}, "temperature None"),
        ({"temperature": 10**400}, "temperature 1000"),
        ({"stop": (b"a",)}, "stop holds b'a'"),
        ({"logit_bias": ((1, 2, 3),)}, "logit_bias"),
        ({"logit_bias": {1.5: 2}}, "logit_bias holds 1.5"),
        ({"grammar": "json"}, "grammar 'json' is no Grammar"),
        ({"repetition_detection": {}}, "repetition_detection {} is no RepetitionDetection"),
    ],
)
def test_what_no_line_can_hold_is_refused_too(untyped, options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)


def test_settings_have_one_form(untyped):
    """Catches equal settings that differ, or that no dictionary can hold."""
    given = Sampling(
        temperature=1,
        top_k=np.int64(3),
        stop="a",
        stop_ids=[np.int32(5)],
        logit_bias={3: 1},
        allowed_ids=range(2),
    )
    assert given == Sampling(
        temperature=1.0,
        top_k=3,
        stop=("a",),
        stop_ids=(5,),
        logit_bias=((3, 1.0),),
        allowed_ids=(0, 1),
    )
    assert len({given: 1}) == 1 and type(given.top_k) is int and type(given.temperature) is float
    json.dumps(vars(given))


def test_settings_of_the_host_compile_nothing_again():
    structures = {
        jax.tree.structure(Sampling(stop=stop, logprobs=len(stop))) for stop in ((), ("a",))
    }
    assert len(structures) == 1
    passed = jax.tree.map(lambda x: x, Sampling(temperature=0.5, seed=3, top_k=2))
    assert (passed.temperature, passed.seed, passed.top_k, passed.stop) == (0.5, 3, 2, ())


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(min_tokens=10), "at least 10 new tokens and for at most 9"),
        (Sampling(stop_ids=(202_048,)), "stop_ids holds token 202048"),
        (Sampling(allowed_ids=(1, 300_000)), "allowed_ids holds token 300000"),
        (Sampling(logit_bias=((250_000, 1.0),)), "logit_bias holds token 250000"),
    ],
)
def test_settings_must_fit_the_model(sampling, words):
    with pytest.raises(UserError, match=f"request 'a'.* {words}"):
        fit_context(SCOUT, Request("a", (1,), 9, sampling))


def test_settings_are_part_of_what_names_a_job():
    """Catches answers of other settings that are kept when a job is run again."""
    settings = [None, Sampling(), Sampling(seed=1), Sampling(grammar=Grammar("regex", "a"))]
    settings += [Sampling(grammar=Grammar("regex", "b")), Sampling(repetition_detection=REPETITION)]
    names = {job_digest([], [Request("a", (1,), 9, sampling)]) for sampling in settings}
    assert len(names) == len(settings)
    assert job_digest(vars(settings[3]), []) != job_digest(vars(settings[4]), [])


def test_several_answers_are_several_lines_that_resume(read, tmp_path):
    requests = read({"n": 3})
    job = job_digest([], requests)
    try:
        with Answers(tmp_path / "out", job, requests) as answers:
            answers.write({"id": "0#1", "text": "b"})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    with Answers(tmp_path / "out", job, requests) as answers:
        assert answers.done == {"0#1"}
        for id_ in ("0#2", "0#0"):
            answers.write({"id": id_, "text": "c"})
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0#0", "0#1", "0#2"]


def test_the_engines_completions_are_what_is_written():
    tokenizer = byte_tokenizer()
    request = Request("a", (1, 2), 9, Sampling(stop=("lo",)))
    completion = Completion(request, request.sampling, tokenizer.stop_ids, tokenizer)
    stream = []
    for token in tokenizer.encode("hello"):
        text = completion.push(token)
        stream.append(CompletionToken(completion, token, text))
    assert tuple(stream[-1]) == (request, token, "stop")
    assert "".join(token.text for token in stream) == "hel"
    *others, (_, record) = finished(iter(stream), tokenizer)
    assert not any(record for _, record in others)
    assert record == {
        "id": "a",
        "text": "hel",
        "tokens": tokenizer.encode("hel"),
        "finish_reason": "stop",
        "stop_reason": "lo",
        "usage": {"prompt_tokens": 2, "completion_tokens": 5},
    }
