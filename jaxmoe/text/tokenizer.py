"""The tokenizer: text to token ids and back, whole or one token at a time."""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders

from jaxmoe.errors import UserError
from jaxmoe.text.meta_vocabulary import BYTE_CHARS, load_meta_vocabulary

BEGIN_OF_TEXT = "<|begin_of_text|>"
STOP_NAMES = ("<|end_of_text|>", "<|eom|>", "<|eot|>")

_HF_FILE = "tokenizer.json"
_META_FILE = "tokenizer.model"
_MAX_PIECE = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(BYTE_CHARS)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer whose special tokens never come from text.

    Attributes:
        backend: the `tokenizers` object, which this class takes over: it is set to read special
            tokens in text as plain text, and to cut and pad nothing.
    """

    backend: tokenizers.Tokenizer

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a tokenizer file, or the one in a checkpoint folder.

        In a folder `tokenizer.json` comes before Meta's `tokenizer.model`.

        Raises:
            UserError: there is no tokenizer at `path`, or its file is broken or not byte-level.
        """
        file = _tokenizer_file(Path(path))
        read = _read_tokenizer_json if file.suffix == ".json" else load_meta_vocabulary
        return cls(read(file))

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` into an existing folder and returns its path."""
        file = Path(folder) / _HF_FILE
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
        """The ids at which Llama 4 ends a text or a turn, as far as the tokenizer has them."""
        return tuple(self.specials[name] for name in STOP_NAMES if name in self.specials)

    def special(self, name: str) -> int:
        """The id of a special token, such as `<|eot|>`; UserError if there is none."""
        if name not in self.specials:
            raise UserError(f"the tokenizer has no special token {name}; use the one of the model")
        return self.specials[name]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The token ids of `text`, after the begin-of-text id if `bos`.

        A special token's name in the text is encoded as plain text. As in Meta's tokenizer the text
        is first cut every 400,000 characters, and within such a piece every 25,000 characters of
        a run of spaces or of non-spaces: both bound the work for one piece of a huge input.

        Raises:
            UserError: the text holds half of a surrogate pair; or `bos`, and the tokenizer has no
                begin-of-text token.
        """
        _check_unicode(text)
        ids = [self.bos_id] if bos else []
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


def _tokenizer_file(path: Path) -> Path:
    if not path.is_dir():
        if path.is_file():
            return path
        raise UserError(f"{path} does not exist; give a tokenizer file or the folder it is in")
    for name in (_HF_FILE, _META_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} has neither {_HF_FILE} nor {_META_FILE}; copy the model's one there")


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer file ({error}); download it again") from None
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise UserError(
            f"{path} is not byte-level, as every Llama 4 tokenizer is; use the model's own"
        )
    return backend


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
