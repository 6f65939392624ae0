"""Jobs: every line becomes a request or an error that names it; output appears when it is whole."""

import io
import json

import pytest

from jaxmoe import parsing
from jaxmoe.errors import UserError
from jaxmoe.generation import jobs as module
from jaxmoe.generation.engine import ERROR, Request, Token
from jaxmoe.generation.jobs import Refusal, finished, read_requests
from tests.small_tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def jobs(tmp_path):
    return tmp_path / "jobs.jsonl"


def read(path, text, tokenizer=None):
    path.write_text(text, encoding="utf-8")
    return read_requests(path, tokenizer, 9)


def refused(path, text, *words, tokenizer=None):
    with pytest.raises(UserError) as caught:
        read(path, text, tokenizer)
    message = str(caught.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message


def test_a_file_of_requests_may_be_long(jobs, monkeypatch):
    """Catches a limit that is meant for configurations."""
    limited = lambda path, most=1: parsing.read_text(path, most)  # noqa: E731
    monkeypatch.setattr(module, "read_text", limited)
    assert read(jobs, '{"id": 2, "tokens": [4]}\n') == [Request(2, (4,), 9)]


def test_tokens_need_no_tokenizer(jobs):
    lines = '{"id": "a", "tokens": [3, 1]}\n{"id": 2, "tokens": [4]}\n'
    assert read(jobs, lines) == [Request("a", (3, 1), 9), Request(2, (4,), 9)]


def test_a_prompt_begins_with_the_begin_token(jobs, tokenizer):
    (request,) = read(jobs, '{"id": 0, "prompt": "na\u00efve"}', tokenizer)
    assert request.tokens[0] == tokenizer.bos_id
    assert tokenizer.decode(request.tokens) == "na\u00efve"


def test_a_prompt_may_name_special_tokens_on_request(jobs, tokenizer):
    jobs.write_text('{"id": 0, "prompt": "<|begin_of_text|>a<|eot|>"}')
    (request,) = read_requests(jobs, tokenizer, 9, parse_special=True)
    a, eot = tokenizer.encode("a"), tokenizer.special("<|eot|>")
    assert request.tokens == (tokenizer.bos_id, *a, eot)


def test_tools_stand_beside_messages(jobs, tokenizer):
    line = {"id": 0, "messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}
    (request,) = read(jobs, json.dumps(line), tokenizer)
    assert '{\n    "name": "f"\n}' in tokenizer.decode(request.tokens)
    refused(jobs, '{"id": 0, "prompt": "a", "tools": []}', "line 1", "'tools'", tokenizer=tokenizer)


def test_messages_open_the_assistants_turn(jobs, tokenizer):
    (request,) = read(jobs, '{"id": 0, "messages": [{"role": "user", "content": "Hi"}]}', tokenizer)
    assert tokenizer.decode(request.tokens, skip_special=False) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_are_skipped_but_counted(jobs, newline):
    lines = ["", '{"id": 1, "tokens": [1]}', "  \t", '{"id": 2, "tokens": [2]}', ""]
    assert [request.id for request in read(jobs, newline.join(lines))] == [1, 2]
    *_, refusal = read(jobs, newline.join([*lines, "no"]))
    assert refusal.error.startswith(f"{jobs} line 6 is not JSON")


@pytest.mark.parametrize("char", ["\u2028", "\u0085"])
def test_only_a_newline_ends_a_line(jobs, tokenizer, char):
    """JSON text may hold what Unicode calls a line separator."""
    line = json.dumps({"id": "a", "prompt": f"x{char}y"}, ensure_ascii=False)
    (request,) = read(jobs, line, tokenizer)
    assert tokenizer.decode(request.tokens) == f"x{char}y"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no", ["not JSON", "column 1"]),
        ('{"id": 1, "tokens": [1]', ["not JSON"]),
        ('{"id": 1, "tokens": [1]} {}', ["not JSON", "column 26"]),
        ("[1, 2]", ["object", '"id"']),
        ("null", ["object", '"id"']),
        ('{"tokens": [1]}', ["object", '"id"']),
        ('{"id": 1}', ["exactly one of prompt, messages, tokens"]),
        ('{"id": 1, "tokens": [1], "prompt": "a"}', ["exactly one of"]),
        ('{"id": 1, "tokens": [1], "temprature": 2}', ["unknown key 'temprature'"]),
        ('{"id": 1, "tokens": "1 2"}', ['"tokens" must be a list of integers']),
        ('{"id": 1, "tokens": [1, 2.0]}', ['"tokens" must be a list of integers']),
        ('{"id": 1, "tokens": [true]}', ['"tokens" must be a list of integers']),
        ('{"id": 1, "prompt": 5}', ['"prompt" must be a string']),
        ('{"id": 1, "prompt": "\\ud83d"}', ["surrogate"]),
        ('{"id": 1, "messages": []}', ["at least one message"]),
        ('{"id": 1, "messages": [{"role": "poet", "content": "a"}]}', ["messages[0]", "role"]),
    ],
)
def test_a_bad_line_is_named_and_refuses_no_other(jobs, tokenizer, line, words):
    good = '{"id": "good", "tokens": [1]}\n'
    first, refusal, last = read(jobs, good + line + "\n" + good.replace("good", "other"), tokenizer)
    assert (first, last) == (Request("good", (1,), 9), Request("other", (1,), 9))
    assert isinstance(refusal, Refusal) and "\n" not in refusal.error
    assert all(word in refusal.error for word in (f"{jobs} line 2", *words)), refusal.error
    known = None if "not JSON" in words or '"id"' in words else 1
    assert refusal.record == {"id": known, "error": refusal.error}


def test_a_request_that_cannot_run_refuses_no_other(jobs):
    """Catches one prompt that is too long and costs the answers to all."""

    def check(request):
        if len(request.tokens) > 1:
            raise UserError("too long.")
        return request

    jobs.write_text('{"id": 1, "tokens": [1, 2]}\n{"id": 2, "tokens": [1]}\n')
    refusal, request = read_requests(jobs, None, 9, check)
    assert refusal == Refusal(1, f"{jobs} line 1: too long.")
    assert request == Request(2, (1,), 9)


def test_where_all_are_refused_the_first_is_named(jobs):
    refused(jobs, '{"id": 1}\nno\n', "line 1", "exactly one of", "All 2 lines are refused")


def test_a_byte_order_mark_and_standard_input(jobs, monkeypatch):
    text = '\ufeff{"id": 1, "tokens": [1]}\n'
    assert read(jobs, text) == [Request(1, (1,), 9)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert read_requests("-", None, 9) == [Request(1, (1,), 9)]


def test_numbers_and_depth_are_bounded(jobs):
    for value in ("1" * 5000, "[" * 100_000):
        refused(jobs, f'{{"id": 1, "tokens": {value}', "line 1")


@pytest.mark.parametrize("line", ['{"id": 1, "prompt": "a"}', '{"id": 1, "messages": []}'])
def test_text_needs_a_tokenizer(jobs, line):
    refused(jobs, line, "line 1", "no tokenizer")


@pytest.mark.parametrize(("first", "second"), [('"a"', '"a"'), ("1", "1"), ("1", '"1"')])
def test_ids_differ_as_text_too(jobs, first, second):
    """A number and the same digits as text would draw the same random numbers."""
    lines = f'{{"id": {first}, "tokens": [1]}}\n\n{{"id": {second}, "tokens": [2]}}'
    request, refusal = read(jobs, lines)
    assert request.tokens == (1,)
    assert all(word in refusal.error for word in ("line 3", "line 1", "must differ"))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_requests_is_refused(jobs, text):
    refused(jobs, text, "no requests")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe4", "tokens": [1]}')
    for name in ("missing.jsonl", "latin.jsonl", "."):
        with pytest.raises(UserError, match=r"cannot be read|is no UTF-8") as caught:
            read_requests(tmp_path / name, None, 9)
        assert str(tmp_path / name) in str(caught.value)


def test_answers_come_with_their_last_token(tokenizer):
    """Two requests that take turns."""
    a, b = Request("a", (1,), 9), Request(2, (1,), 9)
    text = [*tokenizer.encode("hi"), tokenizer.special("<|eot|>")]
    stream = [Token(a, text[0], None), Token(b, text[1], "length")]
    stream += [Token(a, text[1], None), Token(a, text[2], "stop")]
    got = list(finished(iter(stream), tokenizer))
    assert [token for token, _ in got] == stream
    assert [record for _, record in got] == [
        None,
        {"id": 2, "text": "i", "tokens": [text[1]], "finish_reason": "length"},
        None,
        {"id": "a", "text": "hi", "tokens": text, "finish_reason": "stop"},
    ]


def test_without_a_tokenizer_the_text_is_empty():
    ((_, record),) = finished(iter([Token(Request("a", (1,), 9), 5, "length")]), None)
    assert record == {"id": "a", "text": "", "tokens": [5], "finish_reason": "length"}


def test_logits_that_are_not_finite_end_a_request_with_an_error(tokenizer):
    request = Request("a", (1,), 9)
    stream = [Token(request, tokenizer.encode("h")[0], None), Token(request, -1, ERROR)]
    *_, (_, record) = finished(iter(stream), tokenizer)
    assert (record["text"], record["finish_reason"]) == ("h", "error")
    assert "logits after 1 new tokens are not finite" in record["error"]
