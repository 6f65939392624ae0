"""Rows in OpenAI's form and in ours: requests, and lines of output that OpenAI's types accept."""

import dataclasses
import io
import json
import re

import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from jaxmoe.batch.formats import (
    Envelope,
    UnknownColumns,
    encode_part,
    error_line,
    error_of,
    is_failed,
    output_line,
    request_of,
)
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.jobs import Refusal, read_requests
from jaxmoe.generation.request import Request
from jaxmoe.generation.sampling import NO_TOKEN, RepetitionDetection, Sampling
from tests.small_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special("<|eot|>")
HELLO = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello world!"},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
LOOP = RepetitionDetection(max_pattern_size=1, min_pattern_size=1, min_count=4)
quick = settings(max_examples=60, deadline=None)


def chat(url="/v1/chat/completions", **body):
    body = {"model": "m", "messages": HELLO} | body
    return {"custom_id": "request-1", "method": "POST", "url": url, "body": body}


def text(prompt, **body):
    return chat("/v1/completions", prompt=prompt, messages=None, **body)


def asked(row, number=7):
    return request_of(json.dumps(row).encode(), "in.jsonl line 3", number)


def answer(tokens, id_="request-1", prompt=(1, 2, 3), most=99, **sampling):
    """The record of an answer, as the engine makes it."""
    request = Request(id_, prompt, most)
    top = [(TOKENIZER.encode("x")[0], -0.25), (TOKENIZER.encode("y")[0], -1.5)]
    made = Completion(request, Sampling(**sampling), [END], TOKENIZER)
    for token in tokens:
        made.push(token, -0.5, top)
    return made.record()


def answers(*texts, **others):
    return [answer([*TOKENIZER.encode(one), END], **others) for one in texts]


# Requests

EXAMPLES = {  # lines as OpenAI's and vLLM's documents show them
    "OpenAI": (chat(model="gpt-4o-mini", max_tokens=1000), {"max_tokens": 1000}),
    "vLLM": (
        chat(model="meta-llama/Llama-4-Scout-17B-16E-Instruct", max_completion_tokens=1000),
        {"max_completion_tokens": 1000},
    ),
    "Azure": (chat("/chat/completions"), {}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_documented_lines_run_as_they_are(name):
    row, settings = EXAMPLES[name]
    found = asked(row)
    assert found.refusal is None
    assert found.records == ({"id": "request-1", "messages": HELLO} | settings,)
    assert found.envelope.model == row["body"]["model"]


KEYS_THAT_COUNT = {
    "max_tokens": 9,
    "n": 2,
    "seed": 5,
    "stop": ["a", "b"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": -1,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {"65": -100},
    "logprobs": True,
    "top_logprobs": 3,
    "stop_token_ids": [3],
    "min_tokens": 2,
    "include_stop_str_in_output": True,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 4},
}
KEYS_WITHOUT_EFFECT = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "stream": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "length_penalty": 1.0,
    "skip_special_tokens": True,
    "add_special_tokens": False,
    "echo": None,
    "response_format": {"type": "text"},
}


def test_all_known_keys_of_a_body_reach_the_reader_of_requests(tmp_path):
    forms = [
        chat(**KEYS_THAT_COUNT, **KEYS_WITHOUT_EFFECT, tools=[TOOL]),
        chat(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
        chat(guided_choice=["a", "b"], ignore_eos=False),
        chat(structured_outputs={"regex": "a+"}),
        text([1, 2, 3], logprobs=5, add_special_tokens=True),
        text(["a", "b"]),
        text([[1], [2]]),
    ]
    rows = [row | {"custom_id": str(i)} for i, row in enumerate(forms)]
    found = [asked(row) for row in rows]
    assert [one.refusal for one in found] == [None] * len(rows)
    assert found[0].records[0] == {
        **{"id": "0", "messages": HELLO, "tools": [TOOL]},
        **KEYS_THAT_COUNT,
        **{"response_format": {"type": "text"}},
    }
    assert found[2].records[0]["structured_outputs"] == {"choice": ["a", "b"]}
    assert [one["tokens"] for one in found[-1].records] == [[1], [2]]
    records = [record for one in found for record in one.records]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    requests = read_requests(tmp_path / "in.jsonl", TOKENIZER, 5)
    ids = ["0#0", "0#1", "1", "2", "3", "4", "5[0]", "5[1]", "6[0]", "6[1]"]
    assert not [one for one in requests if isinstance(one, Refusal)]
    assert [one.id for one in requests] == ids
    assert requests[0].sampling.logit_bias == ((65, -100.0),) and requests[0].max_new_tokens == 9


def test_without_tool_choice_there_are_no_tools():
    (record,) = asked(chat(tools=[TOOL], tool_choice="none")).records
    assert "tools" not in record


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (chat("/v1/embeddings"), "the url '/v1/embeddings' is not served; use /v1/chat"),
        (chat() | {"method": "GET"}, "the method 'GET' is not POST"),
        (chat() | {"body": [1]}, 'it has no "body" that is an object'),
        (chat() | {"extra": 1}, "it has the unknown key 'extra'"),
        (chat() | {"custom_id": 5}, 'it has no "custom_id" that is text'),
        (chat(messages=None), 'the body has no "messages"'),
        (chat(temprature=1), "the body has the key 'temprature', which is not known"),
        (chat(chat_template="x"), "the key 'chat_template'"),
        (chat(stream=True), "the body's stream is True; only False is possible"),
        (chat(tool_choice="required"), "tool_choice is 'required'; only 'auto' or 'none'"),
        (chat(add_special_tokens=True), "add_special_tokens is True"),
        (chat(prompt="a"), "the key 'prompt'"),
        (chat(guided_json={}, structured_outputs={"json": {}}), "guided_json and structured_"),
        (text([]), '"prompt" .* is no text'),
        (text(["a", 1]), '"prompt" .* is no text'),
        (text("a", best_of=3), "best_of is 3"),
    ],
)
def test_a_line_of_openai_that_cannot_run_says_why(row, words):
    found = asked(row)
    assert found.records == () and found.refusal.startswith("in.jsonl line 3: ")
    assert re.search(words, found.refusal)
    line = error_line(found.envelope, found.refusal)
    assert line["response"]["body"]["error"]["message"] == found.refusal
    assert line["custom_id"] == str(row["custom_id"])


def test_columns_of_ours_that_are_no_settings_are_copied():
    row = {"id": 3, "prompt": "a", "top_k": 5, "answer": "b", "text": None, "tools": [1]}
    found = asked(row)
    assert found.records == ({"id": 3, "prompt": "a", "top_k": 5},)
    line = output_line(found.envelope, answers("hi", id_=3))
    assert line["answer"] == "b" and line["tools"] == [1]
    assert line["text"] == "hi" and line["input_text"] is None and line["id"] == 3
    line = error_line(found.envelope, "It failed.")
    assert line == {"id": 3, "error": "It failed.", "answer": "b", "input_text": None, "tools": [1]}


def test_no_copied_column_hides_another():
    copied = {"input_text": 1, "text": 2, "input_input_text": 3, "error": None}
    line = output_line(Envelope("jaxmoe", "a", copied=copied), answers("hi"))
    assert sorted(str(line[key]) for key in line if key.startswith("input")) == [
        "1",
        "2",
        "3",
        "None",
    ]
    assert not is_failed(line)


def test_rows_of_data_sets_need_no_id_and_may_call_messages_a_prompt():
    found = asked({"prompt": HELLO, "id": None, "messages": None, "tools": [TOOL], "n": None})
    assert found.records == ({"id": "row-7", "messages": HELLO, "tools": [TOOL]},)
    assert found.envelope.copied == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"^in\.jsonl line 3 is not JSON: .* column 2\.$"),
        (b"[1]", r"^in\.jsonl line 3 is no JSON object\.$"),
        (b'{"id": "\xff"}', "is no UTF-8 at byte 8"),
        (b'{"id": 1, "id": 2}', "names 'id' twice"),
        (b'{"prompt": "a", "score": 1e999}', "has the number 1e999, which is too large"),
        (b'{"id": [1], "prompt": "a"}', 'it has an "id" that is neither text nor an integer'),
        (b'{"prompt": "a", "tokens": [1]}', "exactly one of prompt, messages, tokens"),
        (b'{"custom_id": "a"', "is not JSON"),
    ],
)
def test_a_row_that_is_no_request_refuses_itself(content, words):
    found = request_of(content, "in.jsonl line 3", 7)
    assert re.search(words, found.refusal)
    line = error_line(found.envelope, found.refusal)
    assert is_failed(line) and line.get("custom_id", line["id"]) in ("row-7", 1)
    assert ("custom_id" in line) == (b"custom_id" in content)


def test_a_column_that_looks_like_a_setting_is_told_of_once():
    told = UnknownColumns()
    rows = [{"prompt": "a", "temprature": 1, "label": 2}] * 2 + [{"prompt": "a", "max_token": 1}]
    found = [list(told.warnings(asked(row).envelope)) for row in rows]
    assert [len(one) for one in found] == [1, 0, 1]
    assert "'temprature' is copied to the output" in found[0][0] and "'temperature'" in found[0][0]


# Answers


def test_answers_to_a_chat_are_what_openai_reads():
    found = asked(chat(model="scout", n=2, logprobs=True))
    records = [*answers("hé", logprobs=1), answer(TOKENIZER.encode("H"), most=1, logprobs=1)]
    line = output_line(found.envelope, records)
    assert list(line) == ["id", "custom_id", "response", "error"] and line["error"] is None
    assert line["response"]["status_code"] == 200 and not is_failed(line)
    read = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    assert (read.model, read.created, read.object) == ("scout", 0, "chat.completion")
    assert [choice.message.content for choice in read.choices] == ["hé", "H"]
    assert [choice.finish_reason for choice in read.choices] == ["stop", "length"]
    assert [choice.index for choice in read.choices] == [0, 1]
    (first, *_) = read.choices[0].logprobs.content
    assert first.token == "h" and first.logprob == -0.5 and first.top_logprobs[0].bytes == [120]
    usage = read.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 5, 8)
    assert line == output_line(found.envelope, records)
    other = output_line(dataclasses.replace(found.envelope, id="request-2"), records)
    names = [
        (x["id"], x["response"]["request_id"], x["response"]["body"]["id"]) for x in (line, other)
    ]
    assert len({*names[0], *names[1]}) == 6


def test_answers_to_texts_are_what_openai_reads():
    found = asked(text(["ab", "c"], n=2))
    records = answers("é", "b", logprobs=1) + answers("c", "d", prompt=(1,))
    read = TextCompletion.model_validate(
        output_line(found.envelope, records)["response"]["body"], strict=True
    )
    assert [choice.text for choice in read.choices] == ["é", "b", "c", "d"]
    assert read.usage.prompt_tokens == 4 and read.usage.completion_tokens == 9
    logprobs = read.choices[0].logprobs
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "<|eot|>"]
    assert logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset == [0, 0, 1]
    assert logprobs.top_logprobs[0] == {"x": -0.25, "bytes:\\xc3": -0.5}
    assert read.choices[2].logprobs is None


def test_what_openai_has_no_word_for_stands_beside():
    ended = answer(TOKENIZER.encode("ABC"), stop=("B",))
    looped = answer([65] * 9, repetition_detection=LOOP)
    body = output_line(asked(chat()).envelope, [ended, looped])["response"]["body"]
    assert [choice["stop_reason"] for choice in body["choices"]] == ["B", "repetition_detected"]
    assert [c.finish_reason for c in ChatCompletion.model_validate(body).choices] == ["stop"] * 2


def test_answers_of_ours():
    envelope = asked({"id": "q", "prompt": "a", "label": 1}).envelope
    one, two = answers("x", "y", id_="q")
    assert output_line(envelope, [one]) == one | {"label": 1}
    assert output_line(envelope, [one, two]) == {"id": "q", "answers": [one, two], "label": 1}


@pytest.mark.parametrize("row", [chat(), {"id": "request-1", "prompt": "a"}])
def test_an_answer_that_failed_fails_its_line(row):
    records = [*answers("x"), answer([65, NO_TOKEN])]
    line = output_line(asked(row).envelope, records)
    assert is_failed(line)
    if "custom_id" in line:
        error = line["response"]["body"]["error"]
        assert line["response"]["status_code"] == 500 and error["type"] == "server_error"
        line = error | {"error": error["message"]}
    assert line["error"] == records[1]["error"]


def test_both_of_openais_errors():
    envelope = asked(chat()).envelope
    line = error_line(envelope, "It is wrong.")
    assert line["error"] is None and line["response"]["status_code"] == 400
    kinds = {
        "message": "It is wrong.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert line["response"]["body"] == {"error": kinds}
    assert error_of(line) == "It is wrong."
    assert is_failed(line)


# Any content

finite = some.floats(allow_nan=False, allow_infinity=False)
json_values = some.recursive(
    some.none() | some.booleans() | some.integers(-(10**30), 10**30) | finite | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["id", "prompt", "messages", "tokens", "tools", "text", "custom_id", "url", "body", "n"]
objects = some.dictionaries(some.sampled_from(KEYS) | some.text(max_size=3), json_values)
bodies = some.dictionaries(some.sampled_from([*chat()["body"], "prompt", "n", "stop"]), json_values)


@quick
@given(some.binary() | objects.map(lambda row: json.dumps(row).encode()))
def test_whatever_a_line_holds_it_has_a_line_of_output(content):
    found = request_of(content, "in.jsonl line 3", 7)
    assert (found.refusal is None) == bool(found.records)
    lines = [error_line(found.envelope, found.refusal or "It ended.")]
    lines += [output_line(found.envelope, answers("x"))]
    assert [is_failed(line) for line in lines] == [True, False]
    read = encode_part(lines, "jsonl").split(b"\n")
    assert [json.loads(line) for line in read[:-1]] == lines and read[-1] == b""
    assert parquet.read_table(io.BytesIO(encode_part(lines, "parquet"))).num_rows == 2


@quick
@given(some.sampled_from(["/v1/completions", "/v1/chat/completions"]), bodies)
def test_whatever_a_body_holds_it_is_requests_or_refused(url, body):
    found = asked(chat(url) | {"body": body})
    assert (found.refusal is None) == bool(found.records)
    assert found.envelope.id == "request-1"


def test_a_line_holds_what_only_an_escape_can_write():
    found = request_of(b'{"prompt": "a", "label": "\\ud800"}', "in.jsonl line 3", 7)
    line = error_line(found.envelope, "It failed.")
    assert json.loads(encode_part([line], "jsonl"))["label"] == "\ud800"


def test_parquet_has_a_column_of_one_type_for_each_key():
    records = answers("a", "b")
    lines = [
        records[0] | {"label": 1, "score": 1, "mixed": 1, "deep": {"a": [1]}, "big": 2**70},
        records[1] | {"label": None, "score": 0.5, "mixed": "x", "deep": None, "big": 1},
        {"id": "c", "error": "It failed.\ud800"},
    ]
    table = parquet.read_table(io.BytesIO(encode_part(lines, "parquet")))
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types | {"usage": ""} == {
        **{"id": "string", "text": "string", "finish_reason": "string", "error": "string"},
        **{"tokens": "list<element: int64>", "usage": "", "label": "int64", "score": "double"},
        **{"mixed": "string", "deep": "string", "big": "string"},
    }
    first, second, third = table.to_pylist()
    assert first["tokens"] == records[0]["tokens"] and first["usage"] == records[0]["usage"]
    assert (first["mixed"], second["mixed"], first["deep"]) == ("1", "x", '{"a": [1]}')
    assert (first["big"], third["error"], third["tokens"]) == (str(2**70), "It failed.?", None)
