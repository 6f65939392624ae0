"""The tokenizer: text to token ids and back, whole or one token at a time."""

import codecs
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
    quiet_panics,
    read_tokenizer,
)

BEGIN_OF_TEXT = "<|begin_of_text|>"
STOP_NAMES = ("<|end_of_text|>", "<|eom|>", "<|eot|>")

_MAX_PIECE = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(BYTE_CHARS)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer whose special tokens never come from text.

    Attributes:
        backend: the `tokenizers` object, which this class takes over: it is set to read special
            tokens in text as plain text, to cut and pad nothing, and to drop no merges at random.
        names: the special tokens that the checkpoint names, such as `eos_token`.
        templates: the checkpoint's own chat templates by name; without one, `render` writes the
            Llama 4 chat format.
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
        """Loads a tokenizer file, or the one in a checkpoint folder.

        In a folder `tokenizer.json` comes before Meta's `tokenizer.model`. What the files beside it
        say of chat templates and special tokens is read too.

        Raises:
            UserError: there is no tokenizer at `path`, or one of the files is broken, or the
                tokenizer loses text or is not byte-level.
        """
        file = find_tokenizer(Path(path))
        folder = file.parent
        tokenizer = cls(read_tokenizer(file), read_special_names(folder), read_templates(folder))
        tokenizer._check_round_trip(file)
        tokenizer._check_specials(file)
        return tokenizer

    def _check_round_trip(self, file: Path) -> None:
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
        """Only a special token that is an entry of the vocabulary too could come from text."""
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
        """One more than the greatest id; the model's embedding may have more rows."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def bos_id(self) -> int:
        """The id of `<|begin_of_text|>`; UserError if there is none."""
        return self.special(BEGIN_OF_TEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which Llama 4 ends a text or a turn, and of the checkpoint's `eos_token`.

        Only those that the tokenizer has.
        """
        names = dict.fromkeys((*STOP_NAMES, self.names.get("eos_token")))
        return tuple(self.specials[name] for name in names if name in self.specials)

    def special(self, name: str) -> int:
        """The id of a special token, such as `<|eot|>`; UserError if there is none."""
        if name not in self.specials:
            raise UserError(f"the tokenizer has no special token {name}; use the one of the model")
        return self.specials[name]

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = False) -> list[int]:
        """The token ids of `text`, after the begin-of-text id if `bos`.

        A special token's name in the text is encoded as plain text, unless `parse_special`; with
        that a text that itself begins with the begin-of-text token gets no second one. As in Meta's
        tokenizer the text is first cut every 400,000 characters, and within such a piece every
        25,000 characters of a run of spaces or of non-spaces: both bound the work for one piece of
        a huge input.

        Raises:
            UserError: the text holds half of a surrogate pair; or `bos`, and the tokenizer has no
                begin-of-text token.
        """
        ids: list[int] = []
        for part in self.split(text) if parse_special else [text]:
            ids += [part] if isinstance(part, int) else self._encode_plain(part)
        if bos and not (parse_special and ids[:1] == [self.bos_id]):
            ids.insert(0, self.bos_id)
        return ids

    def split(self, text: str) -> list[str | int]:
        """`text` cut at the special tokens that it names, with their ids in their place.

        Raises:
            UserError: the text holds half of a surrogate pair.
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
        """Knows the special tokens and nothing else; all other text is no token to it."""
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
        """The text of `tokens`, with U+FFFD for bytes that are no UTF-8.

        An id that the tokenizer does not know (the embedding may have more rows) has no text.
        """
        text = b"".join(self.token_bytes(token, skip_special) for token in tokens)
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes that one token stands for, which may be a part of a character."""
        if added := self._added.get(token):
            return b"" if added.special and skip_special else added.content.encode()
        chars = self.backend.id_to_token(token) or ""
        return bytes(_BYTE_OF_CHAR[char] for char in chars)


class StreamDecoder:
    """Decodes tokens one at a time, for printing them as they come.

    The pieces joined, with the one from `flush`, are `tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: whole characters only, so it may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was never completed."""
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
    for start in range(0, len(text), _MAX_PIECE):
        piece = text[start : start + _MAX_PIECE]
        cuts = (
            cut
            for run in _RUN.finditer(piece)
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
        )
        for left, right in pairwise((0, *cuts, len(piece))):
            yield piece[left:right]
