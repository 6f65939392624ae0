"""Grammars: answers that are JSON of a schema, match a regex, or are one of several texts.

llguidance compiles a grammar for a tokenizer. A `Matcher` follows one answer, and says which tokens
may come next.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json
from jaxmoe.text import Tokenizer

# llguidance is imported where it is used: it is a large library, and most jobs have no grammar.

KINDS = ("json_schema", "json_object", "regex", "lark", "choice")
# What llguidance adds to a reason: its state, the grammar's text, and an option that is not ours.
_DETAILS = re.compile(r"<state>|\n +1 \||Enable 'coerce_one_of'")
_KEPT = 256  # compiled grammars that a compiler keeps
_JSON = {
    # One way to write whitespace, json.dumps's: where a model may choose, it may write it forever.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Words of a schema that are not supported are refused, whatever its "x-guidance" says.
    "lenient": False,
    "coerce_one_of": False,
}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    Attributes:
        kind: one of `KINDS`.
        text: the schema as JSON; nothing; the regex, in the syntax of Rust's; the grammar, in
            llguidance's dialect of Lark or in llama.cpp's GBNF; a JSON list of texts.

    Raises:
        UserError: if the text is none of that kind, or a schema has words that are not supported.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark", "choice"]
    text: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"grammar {self.kind!r:.80} is unknown; use one of {', '.join(KINDS)}.")
        if not isinstance(self.text, str):
            raise UserError(f"the {self.kind} {self.text!r:.80} is not text; write it as text.")
        if problem := _problem(self.kind, self.text):
            raise UserError(f"the {self.kind} cannot be used: {problem}; correct it.")


@functools.lru_cache(maxsize=_KEPT)
def _problem(kind: str, text: str) -> str:
    """Why a grammar cannot be used, in one sentence without its end; empty if it can be."""
    from llguidance import LLMatcher

    try:
        text.encode()
        return _one_line(LLMatcher.validate_grammar(_SOURCES[kind](text)))
    except (UserError, ValueError) as error:
        return _one_line(str(error).removesuffix("."))


def _one_line(message: str) -> str:
    """The reason in a message of llguidance; what a regex's parser draws has several lines."""
    reasons = re.findall(r"\berror: (.+)", message)
    reason = reasons[-1] if reasons else _DETAILS.split(message)[0]
    return " ".join(reason.split()).removesuffix(".")[:300]


def _schema_source(text: str) -> str:
    from llguidance import LLMatcher

    schema = parse_json(text, "it")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise UserError("it is not an object")
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)


def _object_source(text: str) -> str:
    if text:
        raise UserError("it has a text; use json_schema to say what the object holds")
    return _schema_source('{"type": "object"}')


def _regex_source(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _lark_source(text: str) -> str:
    from llguidance import grammar_from

    return grammar_from("grammar", text)


def _choice_source(text: str) -> str:
    from llguidance import LLMatcher

    choices = parse_json(text, "it")
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise UserError("it is not a list of texts")
    if not choices or not all(choices):
        raise UserError("it holds no text, or an empty one")
    return LLMatcher.grammar_from_regex("|".join(map(_escaped, choices)))


def _escaped(text: str) -> str:
    """A regex that matches a text only."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": _schema_source,
    "json_object": _object_source,
    "regex": _regex_source,
    "lark": _lark_source,
    "choice": _choice_source,
}


class Matcher:
    """Follows one answer: `mask` before a token is chosen, `accept` when it was.

    Attributes:
        error: why the grammar cannot go on, such as that it needs too much memory; else empty.
    """

    def __init__(self, backend: Any, vocab_size: int):
        """Begins where `backend`, an `LLMatcher`, is."""
        self._backend, self._words = backend, -(-vocab_size // 32)
        self.error = ""

    @property
    def may_end(self) -> bool:
        """Whether the answer so far is complete."""
        return not self.error and self._backend.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether nothing but the answer's end may follow."""
        return self._backend.is_stopped()

    def mask(self, drafts: Sequence[int] = ()) -> Int32[np.ndarray, "W"]:
        """The tokens that may come next, as bits: token t is bit t % 32 of word t // 32.

        After an error it is all zeros.

        Args:
            drafts: tokens that the grammar allows, after which the next one comes.
        """
        from llguidance.numpy import fill_next_token_bitmask

        if drafts:
            return self._after(drafts).mask()
        mask = np.zeros((1, self._words), np.int32)
        if not self._failed():
            fill_next_token_bitmask(self._backend, mask)
        return mask[0] * (not self._failed())

    def _after(self, tokens: Sequence[int]) -> "Matcher":
        """One that is so many tokens further; some grammars cannot take tokens back."""
        backend = self._backend.deep_copy()
        backend.consume_tokens(list(tokens))
        return Matcher(backend, 32 * self._words)

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many tokens, from the first on, the grammar allows to come next."""
        return 0 if self._failed() else self._backend.validate_tokens(list(tokens))

    def accept(self, token: int) -> bool:
        """Adds a token to the answer; whether the grammar allows it, else `error` says why not."""
        self._backend.consume_token(token)
        return not self._failed()

    def _failed(self) -> bool:
        self.error = _one_line(self._backend.get_error())
        return bool(self.error)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, each of them once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]):
        """Reads the vocabulary, which takes a second or two for 200,000 tokens the first time.

        Args:
            tokenizer: the model's.
            vocab_size: of the model; ids that the tokenizer does not have are never allowed.
            end_ids: the model's tokens that end an answer, allowed exactly where a grammar may end.

        Raises:
            UserError: if no token ends an answer.
        """
        ends = tuple(sorted({id_ for id_ in end_ids if 0 <= id_ < vocab_size}))
        if not ends:
            raise UserError("a grammar needs a token that ends an answer; the model names none.")
        self._vocab_size = vocab_size
        self._backend = _read_vocabulary(tokenizer, vocab_size, ends)
        self._compiled = functools.lru_cache(maxsize=_KEPT)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer.

        Raises:
            UserError: if the grammar names special tokens that the tokenizer does not have.
        """
        return Matcher(self._compiled(grammar).deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        compiled = LLMatcher(self._backend, _SOURCES[grammar.kind](grammar.text), log_level=0)
        if compiled.is_error():
            reason = _one_line(compiled.get_error())
            raise UserError(f"the {grammar.kind} cannot be used: {reason}; correct it.")
        return compiled


@functools.lru_cache(maxsize=2)
def _read_vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Any:
    """llguidance's tokenizer. It is kept, since each run of the engine has its own compiler."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, list(ends))), eos_token=list(ends)
    )


class _Vocabulary:
    """A vocabulary in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.tokens = [tokenizer.token_bytes(id_, skip_special=False) for id_ in range(vocab_size)]
        for end in ends:  # the tokenizer need not have them
            self.tokens[end] = self.tokens[end] or f"<|end_{end}|>".encode()
        specials = {*tokenizer.specials.values(), *ends}
        self.special_token_ids = sorted(id_ for id_ in specials if id_ < vocab_size)
        self._of_byte = {token: id_ for id_, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar forces; their bytes are the text's.

        llguidance also tries bytes, once, to find out that they are refused.
        """
        if not isinstance(text, str):
            raise TypeError
        ids = self._tokenizer.encode(text)
        if b"".join(self.tokens[id_] for id_ in ids if id_ < len(self.tokens)) == text.encode():
            return ids
        return [self._of_byte[bytes([byte])] for byte in text.encode()]  # a normalizer changed it
