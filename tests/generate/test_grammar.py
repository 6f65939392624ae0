"""Grammars: what a model that only follows the mask can write, and what is refused."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.grammar import Grammar, GrammarCompiler
from jaxmoe.generation.request import ERROR, Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer
from tests.small_tokenizers import byte_tokenizer
from tests.text.conftest import CHAT_SPECIALS, _train, meta, meta_folder  # noqa: F401

SCHEMAS = json.loads((Path(__file__).parent / "json_schemas.json").read_text())["schemas"]
OTHERS = {  # in the style of requests to models
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "either": {
        "anyOf": [
            {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"]},
            {
                "type": "object",
                "properties": {"error": {"enum": ["a", "b"]}},
                "required": ["error"],
            },
        ]
    },
    "call": {
        "type": "object",
        "properties": {
            "name": {"enum": ["weather", "time"]},
            "parameters": {"type": "object", "additionalProperties": {"type": "string"}},
            "when": {"type": ["string", "null"], "format": "date"},
        },
        "required": ["name", "parameters", "when"],
    },
}
# Where the validator errs: 6.1232 / 0.0001 is no whole number in floats, and Python's regexes have
# no \p.
VALIDATOR_ERRS = {
    "multipleOf: by small number",
    "pattern: pattern with Unicode property escape requires unicode mode",
    "patternProperties: patternProperties with Unicode property escape",
}
WALKS = 12
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
FREE_WHITESPACE = re.compile(r"(?<![,:])\s|\s\s|[\t\n\r]")
FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "ipv6", "uuid"))


def small_tokenizer() -> Tokenizer:
    return Tokenizer(_train(CHAT_SPECIALS))


class Walker:
    """A model that takes any token that the mask allows, and after a while those that close."""

    def __init__(self, tokenizer, vocab_size):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.ends = np.array(tokenizer.stop_ids)
        self.compiler = GrammarCompiler(tokenizer, vocab_size, tokenizer.stop_ids)
        closing = {b'"', b"}", b"]", b'"}', b'"]'}
        ids = range(tokenizer.vocab_size)
        self.closing = np.array([i for i in ids if tokenizer.token_bytes(i) in closing])

    def allowed(self, matcher):
        """Whether each token is allowed."""
        mask = matcher.mask()
        assert mask.shape == (-(-self.vocab_size // 32),)
        return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)

    def walk(self, grammar, seed, most=400):
        """An answer's text; None if it is not complete after `most` tokens."""
        rng, matcher, tokens = np.random.default_rng(seed), self.compiler.matcher(grammar), []
        patience = rng.integers(1, 60)
        while len(tokens) < most:
            allowed = self.allowed(matcher)
            assert not matcher.error and not allowed[self.tokenizer.vocab_size :].any()
            assert (allowed[self.ends] == matcher.may_end).all()
            if matcher.finished or (matcher.may_end and rng.random() < 0.3):
                assert matcher.accept(int(rng.choice(self.ends)))
                return self.tokenizer.decode(tokens)
            allowed[self.ends] = False
            closing = self.closing[allowed[self.closing]] if len(tokens) > patience else ()
            choices = closing if len(closing) else np.flatnonzero(allowed)
            if not len(choices):  # the grammar can only end, which llguidance finds out late
                assert matcher.may_end
                return self.tokenizer.decode(tokens)
            tokens.append(int(rng.choice(choices)))
            assert matcher.accept(tokens[-1])
        return None


@pytest.fixture(scope="module")
def small():
    tokenizer = small_tokenizer()
    return Walker(tokenizer, tokenizer.vocab_size + 41)


@pytest.fixture(scope="module")
def bytes_only():
    tokenizer = byte_tokenizer()
    return Walker(tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def meta_walker(meta):  # noqa: F811
    return Walker(meta, 202_048)


def check_answers(walker, name, schema, walks):
    """Whether the schema is accepted; its answers then are."""
    try:
        grammar = Grammar("json_schema", json.dumps(schema))
    except UserError as error:
        reason = str(error).removeprefix("the json_schema cannot be used: ")
        assert reason.endswith("; correct it.") and len(reason) > 16 and "\n" not in reason
        return False
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    texts = [text for seed in range(walks) if (text := walker.walk(grammar, seed)) is not None]
    for text in texts:
        value = json.loads(text)
        assert name in VALIDATOR_ERRS or validator.is_valid(value), text
        assert not FREE_WHITESPACE.search(STRING.sub("", text)), text
    assert 2 * len(texts) > walks
    return True


@pytest.mark.slow
def test_every_answer_to_a_public_schema_is_valid_or_the_schema_is_refused(small, bytes_only):
    """All 383 schemas of the official test suite are tried."""
    for walker in (small, bytes_only):
        accepted = [
            name for name, schema in SCHEMAS.items() if check_answers(walker, name, schema, WALKS)
        ]
        assert len(SCHEMAS) > 200 and len(accepted) > 160
    words = ("not", "if", "contains", "propertyNames", "dependentRequired", "unevaluatedItems")
    assert not any(name.startswith(f"{word}:") for name in accepted for word in words)


@pytest.mark.parametrize("name", OTHERS)
def test_answers_to_schemas_of_daily_use_are_valid(meta_walker, small, name):
    for walker in (meta_walker, small):
        assert check_answers(walker, name, OTHERS[name], 20)


def test_public_schemas_with_metas_tokenizer(meta_walker):
    for name in list(SCHEMAS)[::8]:
        check_answers(meta_walker, name, SCHEMAS[name], 2)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "x-guidance": {"lenient": True}, "propertyNames": {}}, "propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
        ({"$ref": "http://localhost:1/a.json"}, "http://localhost:1/a.json"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
        ([], "object"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(schema, word):
    with pytest.raises(UserError) as caught:
        Grammar("json_schema", json.dumps(schema))
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "word"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", '{"type": "\ud800"}', "surrogate"),
        ("json_object", "{}", "use json_schema"),
        ("regex", "(", "unclosed group"),
        ("regex", "\ud800", "surrogate"),
        ("lark", "start: foo", "foo"),
        ("lark", "", "lark"),
        ("choice", "yes", "not JSON"),
        ("choice", "[1]", "list of texts"),
        ("choice", "[]", "no text"),
        ("choice", '["a", ""]', "no text"),
    ],
)
def test_a_grammar_that_is_none_is_refused(kind, text, word):
    with pytest.raises(UserError) as caught:
        Grammar(kind, text)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_kind_is_refused(untyped):
    with pytest.raises(UserError, match=r"'ebnf' is unknown; use one of json_schema,"):
        Grammar("ebnf", "")
    with pytest.raises(UserError, match="is not text"):
        Grammar("regex", 5)


CHOICES = ["yes", 'no\n"|\\', "\u00e9\U0001f389", "yesterday"]


@pytest.mark.parametrize(
    ("kind", "text", "good"),
    [
        ("regex", "a+b?", lambda text: text.strip("a") in ("", "b") and text.startswith("a")),
        ("choice", json.dumps(CHOICES), CHOICES.__contains__),
        (
            "lark",
            'start: "a" b\nb: /[0-9]{1,2}/',
            lambda text: text[0] == "a" and int(text[1:]) < 100,
        ),
        ("lark", 'root ::= "x" | "y"', ("x", "y").__contains__),
        ("json_object", "", lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_other_grammars_are_followed(small, bytes_only, kind, text, good):
    for walker in (small, bytes_only):
        texts = [walker.walk(Grammar(kind, text), seed) for seed in range(20)]
        assert all(good(text) for text in texts if text is not None)
        assert any(text is not None for text in texts)


def test_json_separates_as_json_dumps_does(small):
    """One way to write whitespace: where it is free, a model may write it forever."""
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": [1, 2]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    text = small.walk(Grammar("json_schema", json.dumps(schema)), 0)
    assert text == '{"a": 1, "b": [1, 2]}'


def test_a_grammar_is_compiled_once(small):
    grammar = Grammar("regex", "ab")
    first, second = small.compiler.matcher(grammar), small.compiler.matcher(Grammar("regex", "ab"))
    assert small.compiler._compiled.cache_info().hits
    assert first.accept(small.tokenizer.encode("a")[0])
    assert second.mask().any() and (first.mask() != second.mask()).any()


def test_no_token_beyond_the_tokenizer_is_allowed_but_the_models_stop_token(small):
    beyond = small.tokenizer.vocab_size + 5
    compiler = GrammarCompiler(small.tokenizer, small.vocab_size, (beyond, 10**6))
    matcher = compiler.matcher(Grammar("regex", "(?s:.*)"))
    allowed = small.allowed(matcher)
    assert np.flatnonzero(allowed[small.tokenizer.vocab_size :]) == [5] and allowed.sum() > 200
    assert not allowed[list(small.tokenizer.specials.values())].any()
    assert matcher.accept(beyond) and matcher.finished and matcher.may_end


def test_a_model_without_stop_tokens_has_no_grammars(small):
    with pytest.raises(UserError, match="needs a token that ends an answer"):
        GrammarCompiler(small.tokenizer, small.vocab_size, ())


def test_a_special_token_that_the_tokenizer_lacks_is_refused(small):
    with pytest.raises(UserError, match=r"the lark cannot be used: .*<\|poem\|>"):
        small.compiler.matcher(Grammar("lark", 'start: <|poem|> "a"'))


def answer(walker, text, count, **settings):
    """The record of an answer with so many tokens at most, whose tokens are those of a text."""
    grammar = Grammar("json_object")
    completion = Completion(
        Request("a", (1,), count),
        Sampling(grammar=grammar, **settings),
        walker.ends.tolist(),
        walker.tokenizer,
        walker.compiler.matcher(grammar),
    )
    for token in [*walker.tokenizer.encode(text), int(walker.ends[0])]:
        completion.push(token)
        if completion.finish_reason:
            return completion.record()


def test_json_that_was_cut_says_so(bytes_only):
    text = '{"a": 1}'
    whole = answer(bytes_only, text, 99)
    assert (whole["text"], whole["finish_reason"]) == (text, "stop") and "warning" not in whole
    assert "warning" not in answer(bytes_only, text, 8)
    cut = answer(bytes_only, text, 5)
    assert cut["finish_reason"] == "length"
    assert cut["warning"] == "its JSON is incomplete after 5 tokens; allow more."
    stopped = answer(bytes_only, text, 99, stop=("}",))
    assert stopped["text"] == '{"a": 1' and "incomplete" in stopped["warning"]
    assert "warning" not in answer(bytes_only, text, 9, stop=("}",), include_stop_in_output=True)


def test_a_token_that_the_grammar_forbids_is_an_error(bytes_only):
    record = answer(bytes_only, '{"a"?', 99)
    assert record["finish_reason"] == ERROR and record["text"] == '{"a"'
    assert record["error"].startswith("request 'a': its grammar cannot go on: ")
    assert "\n" not in record["error"] and len(record["tokens"]) == 4
