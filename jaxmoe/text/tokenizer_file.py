"""Finds, reads and checks tokenizer files.

A `tokenizer.json` may come from anyone. The `tokenizers` library checks its structure, but not that
every entry of a byte-level vocabulary stands for bytes, and some files make it panic.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_text
from jaxmoe.text.meta_vocabulary import BYTE_CHARS, load_meta_vocabulary

HF_FILE = "tokenizer.json"
META_FILE = "tokenizer.model"

_NO_BYTE = re.compile(f"[^{re.escape(''.join(BYTE_CHARS))}]")
_CODE_POINTS = (
    *range(0x80),
    *range(0x80, 0x800, 0x40),  # every first byte of sequences of two, then three, then four
    *(0x800, *range(0x1000, 0x10000, 0x1000)),
    *(0x10000, *range(0x40000, 0x110000, 0x40000)),
    *range(0x400, 0x440),  # every byte after the first
)
ALL_BYTES = " " + "".join(map(chr, _CODE_POINTS))
"""A text with every byte that occurs in UTF-8.

It begins with a space, which some tokenizers would put in front otherwise.
"""


def find_tokenizer(path: Path) -> Path:
    """The tokenizer file at `path`, which is a file or a folder.

    In a folder that is `tokenizer.json`, or else Meta's `tokenizer.model`.

    Raises:
        UserError: if there is none.
    """
    if not path.is_dir():
        if path.is_file():
            return path
        raise UserError(f"{path} does not exist; give a tokenizer file or the folder it is in")
    for name in (HF_FILE, META_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} has neither {HF_FILE} nor {META_FILE}; copy the model's one there")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer that `find_tokenizer` could find."""
    return any((folder / name).exists() for name in (HF_FILE, META_FILE))


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json` or Meta's `tokenizer.model`.

    Raises:
        UserError: if the file cannot be read, is broken or is not byte-level.
    """
    return _read_tokenizer_json(file) if file.suffix == ".json" else load_meta_vocabulary(file)


@contextlib.contextmanager
def errors_of_library(sentence: str) -> Iterator[None]:
    """Turns whatever the `tokenizers` library raises into a UserError that begins with `sentence`.

    Panics in Rust are BaseExceptions, so all exceptions are caught but those that end a program.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{sentence} ({reason:.200}); download it again") from None


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """Discards the process's standard error within the context, where Rust reports panics."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    with errors_of_library(f"{path} is not a tokenizer file"), quiet_panics():
        backend = tokenizers.Tokenizer.from_str(text)
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise UserError(
            f"{path} is not byte-level, as every Llama 4 tokenizer is; use the model's own"
        )
    _check_vocabulary(path, backend)
    return backend


def _check_vocabulary(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Checks that every entry stands for bytes or is an added token, and that ids are unique.

    Raises:
        UserError: naming the first entry that is not so.
    """
    entries = list(map(backend.id_to_token, range(backend.get_vocab_size())))
    token_of = {id_: token for id_, token in enumerate(entries) if token is not None}
    if len(token_of) < len(entries):  # an id is missing, or above the others
        token_of = _token_of_id(path, backend.get_vocab())
    if not _NO_BYTE.search("".join(token_of.values())):
        return
    added = backend.get_added_tokens_decoder()
    for id_, token in token_of.items():
        if id_ not in added and _NO_BYTE.search(token):
            raise UserError(
                f"{path} has the entry {token!r:.80} (id {id_}), which stands for no bytes; "
                "download it again"
            )


def _token_of_id(path: Path, vocab: dict[str, int]) -> dict[int, str]:
    """The tokens by id; raises a UserError if two have the same."""
    token_of: dict[int, str] = {}
    for token, id_ in sorted(vocab.items()):
        if token_of.setdefault(id_, token) != token:
            raise UserError(
                f"{path} gives {token_of[id_]!r:.80} and {token!r:.80} one id, {id_}; "
                "download it again"
            )
    return token_of
