"""The tokenizer: encodes text into token ids and decodes them, also one at a time."""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, normalizers

from jaxmoe.errors import UserError
from jaxmoe.text.meta_vocabulary import BYTE_CHARS
from jaxmoe.text.template import ChatTemplate, read_special_names, read_templates
from jaxmoe.text.tokenizer_file import (
    ALL_BYTES,
    HF_FILE,
    errors_of_library,
    find_tokenizer,
    has_tokenizer,
    quiet_panics,
    read_tokenizer,
)

BEGIN_OF_TEXT = "<|begin_of_text|>"
STOP_NAMES = ("<|end_of_text|>", "<|eom|>", "<|eot|>")

_MAX_PIECE = 400_000  # characters that are encoded at once
_MAX_RUN = 25_000  # characters of whitespace, or without any, that are encoded at once
_RUN = re.compile(r"\s+|\S+")
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(BYTE_CHARS)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer whose special tokens never come from text.

    Attributes:
        backend: the `tokenizers` object. This class changes its settings: special tokens in text
            are plain text, and there is no truncation, padding or BPE dropout.
        names: the checkpoint's special tokens by their roles, such as `eos_token`.
        templates: the checkpoint's chat templates by name; without any, `render` writes Llama 4's
            chat format.
    """

    backend: tokenizers.Tokenizer
    names: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, ChatTemplate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        if getattr(self.backend.model, "dropout", None):
            self.backend.model.dropout = None

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a tokenizer, with the chat templates and names of special tokens beside it.

        Args:
            path: a tokenizer file, or a folder with `tokenizer.json` or else Meta's
                `tokenizer.model`.

        Raises:
            UserError: if there is no tokenizer at `path`, one of the files is broken, or the
                tokenizer loses text or is not byte-level.
        """
        file = find_tokenizer(Path(path))
        folder = file.parent
        tokenizer = cls(read_tokenizer(file), read_special_names(folder), read_templates(folder))
        tokenizer._check_round_trip(file)
        tokenizer._check_specials(file)
        return tokenizer

    @classmethod
    def load_if_any(cls, folder: str | Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint's folder, as `load`; None if there is none."""
        return cls.load(folder) if has_tokenizer(Path(folder)) else None

    def _check_round_trip(self, file: Path) -> None:
        """Raises a UserError if encoding and decoding loses bytes."""
        normalizer = self.backend.normalizer
        with errors_of_library(f"{file} is no tokenizer that can be used"), quiet_panics():
            in_bytes = normalizer is None or isinstance(normalizer, normalizers.ByteLevel)
            text = ALL_BYTES if in_bytes else normalizer.normalize_str(ALL_BYTES)
            ids = self.backend.encode(ALL_BYTES, add_special_tokens=False).ids
            kept = self.decode(ids, skip_special=False)
        if kept != text:
            raise UserError(
                f"{file} loses text: some bytes are in no entry of its vocabulary, or it does not "
                "split text into bytes; download it again"
            )

    def _check_specials(self, file: Path) -> None:
        """Raises a UserError if a special token's name in plain text becomes that token.

        That is possible only for special tokens that the vocabulary of the BPE has too.
        """
        entries = self.backend.model
        name_of = {id_: name for name, id_ in self.specials.items()}
        for name in self.specials:
            ids = self.encode(name) if entries.token_to_id(name) is not None else []
            for id_ in name_of.keys() & set(ids):
                raise UserError(
                    f"{file} reads the special token {name_of[id_]!r:.80} out of plain text; "
                    "use the model's own"
                )

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` into an existing folder and returns its path."""
        file = Path(folder) / HF_FILE
        self.backend.save(str(file), pretty=False)
        return file

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def specials(self) -> dict[str, int]:
        """The id of each special token, by name."""
        return {token.content: id_ for id_, token in self._added.items() if token.special}

    @cached_property
    def vocab_size(self) -> int:
        """The greatest id plus one; the model's embedding may have more rows."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def digest(self) -> str:
        """A SHA-256 that differs between tokenizers that read or write texts differently."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def bos_id(self) -> int:
        """The id of `<|begin_of_text|>`.

        Raises:
            UserError: if the tokenizer does not have it.
        """
        return self.special(BEGIN_OF_TEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text or a turn of Llama 4, and that of the checkpoint's `eos_token`.

        Tokens that the tokenizer does not have are left out.
        """
        names = dict.fromkeys((*STOP_NAMES, self.names.get("eos_token")))
        return tuple(self.specials[name] for name in names if name in self.specials)

    def special(self, name: str) -> int:
        """The id of a special token, such as `<|eot|>`.

        Raises:
            UserError: if the tokenizer does not have it.
        """
        if name not in self.specials:
            raise UserError(f"the tokenizer has no special token {name}; use the one of the model")
        return self.specials[name]

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = False) -> list[int]:
        """Encodes a text.

        As in Meta's tokenizer, the text is first split every 400,000 characters, and then every
        25,000 characters within a run of whitespace or of other characters, which bounds the work
        for one piece of a huge text.

        Args:
            text: the text.
            bos: whether to put the begin-of-text token in front. With `parse_special`, a text that
                begins with that token gets no second one.
            parse_special: whether names of special tokens in the text become these tokens; else
                they are encoded as plain text.

        Raises:
            UserError: if the text holds half of a surrogate pair, or there is no begin-of-text
                token and `bos` is true.
        """
        ids: list[int] = []
        for part in self.split(text) if parse_special else [text]:
            ids += [part] if isinstance(part, int) else self._encode_plain(part)
        if bos and not (parse_special and ids[:1] == [self.bos_id]):
            ids.insert(0, self.bos_id)
        return ids

    def split(self, text: str) -> list[str | int]:
        """Splits a text at the names of special tokens, which are replaced by their ids.

        Raises:
            UserError: if the text holds half of a surrogate pair.
        """
        _check_unicode(text)
        parts, end = [], 0
        found = self._splitter.encode(text, add_special_tokens=False)
        for id_, (start, stop) in zip(found.ids, found.offsets, strict=True):
            name = self._splitter.id_to_token(id_) or ""
            parts += [text[end:start], self.special(name)]
            end = stop
        return [*parts, text[end:]]

    @cached_property
    def _splitter(self) -> tokenizers.Tokenizer:
        """A tokenizer without a vocabulary, which finds the special tokens in a text."""
        splitter = tokenizers.Tokenizer(models.BPE())
        splitter.add_special_tokens([token for token in self._added.values() if token.special])
        return splitter

    def _encode_plain(self, text: str) -> list[int]:
        _check_unicode(text)
        ids: list[int] = []
        with errors_of_library("the tokenizer cannot encode this text"):
            for piece in _pieces(text):
                ids += self.backend.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """Decodes token ids; bytes that are not UTF-8 become U+FFFD.

        An id that the tokenizer does not have decodes to nothing: the embedding may have more rows
        than the tokenizer has ids.

        Args:
            tokens: the ids.
            skip_special: whether special tokens decode to nothing, and not to their names.
        """
        text = b"".join(self.token_bytes(token, skip_special) for token in tokens)
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes of one token, which may be a part of a character; arguments as in `decode`."""
        if added := self._added.get(token):
            return b"" if added.special and skip_special else added.content.encode()
        chars = self.backend.id_to_token(token) or ""
        return bytes(_BYTE_OF_CHAR[char] for char in chars)


class StreamDecoder:
    """Decodes token ids one at a time, to print them while they are generated.

    The concatenation of all texts that `push` and finally `flush` return is `tokenizer.decode` of
    all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that a token completes; only whole characters, so it may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    @property
    def pending(self) -> bool:
        """Whether the last tokens have begun a character that is not complete."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """The rest of the text: U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(
            f"the text holds {half!a}, half of a surrogate pair, at character {error.start}: "
            "it is not valid Unicode; remove that character"
        ) from None


def _pieces(text: str) -> Iterator[str]:
    """The pieces of a text that are encoded one by one; see `Tokenizer.encode`."""
    if 0 < len(text) <= _MAX_RUN:  # looking for runs would take as long as encoding
        yield text
        return
    for start in range(0, len(text), _MAX_PIECE):
        piece = text[start : start + _MAX_PIECE]
        cuts = (
            cut
            for run in _RUN.finditer(piece)
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
        )
        for left, right in pairwise((0, *cuts, len(piece))):
            yield piece[left:right]
