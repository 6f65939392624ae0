"""Token files: text of files, as documents, in the form that `read_tokens` reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxmoe.errors import UserError
from jaxmoe.files.outputs import written
from jaxmoe.parsing import MAX_TEXT_BYTES, decode_text, parse_json, read_text
from jaxmoe.text import Tokenizer

END_OF_TEXT = "<|end_of_text|>"


def documents(path: str | Path) -> Iterator[str]:
    """The documents of a file: the `"text"` of each line of `.jsonl`; any other file is one.

    Raises:
        UserError: naming the line that holds no text, or if the file cannot be read.
    """
    if Path(path).suffix != ".jsonl":
        yield read_text(path, MAX_TEXT_BYTES)
        return
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(line, f"{path} line {number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _text(line: bytes, where: str) -> str:
    record = parse_json(decode_text(line, where), where)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} is no object with a "text"; write {{"text": "..."}} a line.')
    return record["text"]


def tokens_of(texts: Iterable[str], tokenizer: Tokenizer) -> Integer[np.ndarray, "tokens"]:
    """Every text between the begin-of-text token and, if there is one, the end-of-text token.

    Raises:
        UserError: if a text is no Unicode, or there is none.
    """
    end = [tokenizer.special(END_OF_TEXT)] if END_OF_TEXT in tokenizer.specials else []
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    ids = [np.array([*tokenizer.encode(text, bos=True), *end], dtype) for text in texts]
    if not ids:
        raise UserError("there are no documents; give a file that holds text.")
    return np.concatenate(ids)


def save_tokens(path: str | Path, tokens: Integer[np.ndarray, "tokens"]) -> None:
    """Writes an `.npy` file, at once or not at all.

    Raises:
        UserError: if it is being written by another process, or cannot be written.
    """
    header = np.lib.format.header_data_from_array_1_0(tokens)
    with written(path) as file:  # not by numpy.save, which cannot write to a pipe
        np.lib.format.write_array_header_1_0(file, header)
        file.write(memoryview(np.ascontiguousarray(tokens)).cast("B"))
