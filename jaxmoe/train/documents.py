"""Documents that are tokenized once, in files that are mapped into memory.

A run's documents, in the order of their files, are in one folder:

- `tokens.bin`: the ids of all documents, one after the other; `learned.bin`: a byte a token.
- `documents.bin`: a record of `RECORD` a document.
- `rows.bin`: the JSON of those rows that have pictures, which are read again for each batch.
- `skipped.jsonl`: the first rows that could not be used, and why.
- `index.json`: what the folder was made of, and the number of documents of each source.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxmoe.errors import UserError
from jaxmoe.files.atomic import locked, rename, sync, writable
from jaxmoe.files.outputs import PARTIAL, write_json
from jaxmoe.files.rows import place_of_row
from jaxmoe.images import ImageSettings, PictureReader
from jaxmoe.parsing import read_json
from jaxmoe.progress import byte_progress
from jaxmoe.text import Learned, Prompt, Tokenizer, render_learned
from jaxmoe.train.conversations import Example, Text, example_of, pair_of
from jaxmoe.train.make_tokens import END_OF_TEXT
from jaxmoe.train.sources import RawRow, read_rows

SKIPPED, INDEX = "skipped.jsonl", "index.json"
FILES = ("tokens.bin", "learned.bin", "documents.bin", "rows.bin", SKIPPED)
VERSION = 2  # of the files' layout and of what makes tokens of a row
LISTED = 1000  # rows that `SKIPPED` has at most
UPDATE = 256  # rows from one update of the progress bar to the next
SAMPLE = 2**20  # bytes at the beginning, the middle and the end of a file that tell it apart
RECORD = np.dtype(
    [
        ("length", "<i8"),  # tokens
        ("targets", "<i8"),  # learned tokens, but for the first, which nothing predicts
        ("stored", "<i8"),  # bytes in rows.bin
        ("tiles", "<i4"),
        ("file", "<i4"),
        ("number", "<i8"),  # of its line or row
        ("second", "<i8"),  # tokens before the rejected answer's of a pair; 0 if it is no pair
    ]
)
_DAMAGED = "{} is damaged; delete it, and it is made again."


class Reading(NamedTuple):
    """How rows become documents.

    Attributes:
        tokenizer: of the model.
        images: how pictures become tiles; None if the model has no vision tower.
        skips: whether a row that cannot be used is passed over, instead of stopping the run.
        pairs: whether a row is a chosen and a rejected answer.
    """

    tokenizer: Tokenizer
    images: ImageSettings | None = None
    skips: bool = False
    pairs: bool = False

    def render(self, row: RawRow) -> Learned:
        """A row's tokens and pictures, and which tokens are learned.

        Raises:
            UserError: naming the file, the line and the key, if it cannot be used.
        """
        with _named(row):
            return self._rendered(example_of(row.parse()), row)

    def render_pair(self, row: RawRow) -> tuple[Learned, int]:
        """The chosen answer after its prompt, then the rejected one after the same prompt.

        Returns:
            Both as one, with the pictures of one, and how many tokens the first has.

        Raises:
            UserError: as `render`, also if an answer has no tokens to learn, or other pictures than
                the other one.
        """
        with _named(row):
            both = [self._rendered(example, row) for example in pair_of(row.parse())]
            for name, (_, learned) in zip(("chosen", "rejected"), both, strict=True):
                if not learned[1:].any():
                    raise UserError(f"its '{name}' has no answer of the assistant's")
            first, second = ([x.digest for x in prompt.pictures] for prompt, _ in both)
            if first != second:
                raise UserError(
                    "its 'chosen' and 'rejected' show different pictures; let the prompt show all "
                    "of them, which both share"
                )
        tokens = [token for prompt, _ in both for token in prompt.tokens]
        learned = np.concatenate([learned for _, learned in both])
        return Learned(Prompt(tokens, both[0].prompt.pictures), learned), len(both[0].learned)

    def _rendered(self, example: Example, row: RawRow) -> Learned:
        if isinstance(example, Text):
            return _of_text(example, self.tokenizer)
        reader = PictureReader(self.images, row.path.parent) if self.images else None
        messages, tools, images = example
        return render_learned(messages, self.tokenizer, reader, tools, images)


@contextlib.contextmanager
def _named(row: RawRow) -> Iterator[None]:
    """Within it, errors name the row."""
    try:
        yield
    except UserError as error:
        where = "" if str(error).startswith(row.where) else f"{row.where}: "
        raise UserError(f"{where}{str(error).rstrip('.')}.") from None


def _of_text(example: Text, tokenizer: Tokenizer) -> Learned:
    """The tokens of a text after the begin-of-text token, with the end-of-text token if any."""
    end = [tokenizer.special(END_OF_TEXT)] if END_OF_TEXT in tokenizer.specials else []
    given = tokenizer.encode(example.prompt or "", bos=True)
    tokens = [*given, *tokenizer.encode(example.text), *end]
    learned = np.arange(len(tokens)) >= (0 if example.prompt is None else len(given))
    return Learned(Prompt(tokens), learned)


class Documents:
    """The documents of a folder that `build` made.

    Attributes:
        tokens: ids of all of them.
        learned: which of these the loss counts.
        records: an array of `RECORD`.
        offsets: where each begins in `tokens`; one more.
        files: that they come from.
        sources: the documents of each source, as a range.
        skipped: how many rows were passed over.
        made_of: a digest of what they depend on.
    """

    def __init__(self, folder: Path):
        """Maps the files.

        Raises:
            UserError: if they are not as they were written.
        """
        index = _index(folder)
        self.tokens = _mapped(folder / "tokens.bin", index["dtype"])
        self.learned = _mapped(folder / "learned.bin", "bool")
        self.records = _mapped(folder / "documents.bin", RECORD)
        self.offsets = _starts(self.records["length"])
        self.files = [Path(name) for name in index["files"]]
        ends = np.cumsum([0, *index["counts"]]).tolist()
        self.sources = [range(a, b) for a, b in itertools.pairwise(ends)]
        self.skipped: int = index["skipped"]
        self.made_of: str = index["made_of"]
        self._rows = folder / "rows.bin"
        self._row_offsets = _starts(self.records["stored"])
        if self.offsets[-1] != len(self.tokens) or ends[-1] != len(self.records):
            raise UserError(_DAMAGED.format(folder))

    def __len__(self) -> int:
        return len(self.records)

    def where(self, document: int) -> str:
        """The file and line of a document."""
        record = self.records[document]
        return place_of_row(self.files[record["file"]], int(record["number"]))

    def row(self, document: int) -> RawRow:
        """The row of a document with pictures."""
        record = self.records[document]
        with open(self._rows, "rb") as file:
            file.seek(self._row_offsets[document])
            content = file.read(int(record["stored"]))
        return RawRow(self.files[record["file"]], int(record["number"]), content, 0)


def _index(folder: Path) -> dict[str, Any]:
    """What `_build` wrote last, of files that have the sizes that they had then.

    Raises:
        UserError: if it is damaged, or a file has another size.
    """
    match read_json(folder / INDEX):
        case {"index": dict(index), "sha256": digest} if digest == _digest(index):
            sizes = index["sizes"]
            if all((folder / name).exists() for name in sizes) and sizes == _sizes(folder):
                return index
    raise UserError(_DAMAGED.format(folder))


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in FILES}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _starts(lengths: np.ndarray) -> Int64[np.ndarray, "documents_1"]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def documents_in(place: Path, sources: Sequence[Sequence[Path]], reading: Reading) -> Documents:
    """The documents of sources, from the folder `place` if it has them, else built there.

    After an error, and after a kill of the process, nothing is at `place`.

    Raises:
        UserError: if a row cannot be used and is not to be skipped, a file cannot be read, or the
            folder holds what was made of other files or by another tokenizer.
    """
    made_of = _fingerprint(sources, reading)
    if not (place / INDEX).exists():
        with _prepared(place) as folder:
            _build(folder, sources, reading, made_of)
    elif _index(place)["made_of"] != made_of:
        raise UserError(
            f"{place} was made of other data: the files, the tokenizer or the chat template have "
            "changed since; restore them, or choose another output."
        )
    return Documents(place)


def _fingerprint(sources: Sequence[Sequence[Path]], reading: Reading) -> str:
    """A digest of what documents depend on: of files, their sizes and samples of their content."""
    templates = {name: x.source for name, x in reading.tokenizer.templates.items()}
    files = [[_sampled(path) for path in paths] for paths in sources]
    parts = [VERSION, files, reading.tokenizer.digest, templates, dict(reading.tokenizer.names)]
    return _digest([*parts, repr(reading.images), reading.skips, reading.pairs])


def _sampled(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    return digest.hexdigest()


@contextlib.contextmanager
def _prepared(place: Path) -> Iterator[Path]:
    """A folder beside `place` that becomes it at the end of the context; removed after an error."""
    partial = place.with_name(place.name + PARTIAL)
    is_new = not place.parent.exists()
    with writable(place):
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            try:
                for file in partial.iterdir():  # of a process that was killed
                    file.unlink()
                yield partial
                rename(partial, place)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                if is_new:
                    with contextlib.suppress(OSError):
                        place.parent.rmdir()
                raise


def _build(folder: Path, sources: Sequence[Sequence[Path]], reading: Reading, made_of: str) -> None:
    """Writes the files of `Documents`, with memory for one row at a time."""
    files = [path for paths in sources for path in paths]
    dtype = "uint16" if reading.tokenizer.vocab_size <= 2**16 else "uint32"
    with contextlib.ExitStack() as stack:
        writer = _Writer(stack, folder, dtype)
        update = stack.enter_context(byte_progress("Tokenizing"))
        total, before, counts = sum(path.stat().st_size for path in files), 0, []
        number = itertools.count()
        for paths in sources:
            first = writer.count
            for path in paths:
                writer.file = next(number)
                for row in read_rows(path):
                    writer.add(row, reading)
                    if not row.number % UPDATE:
                        update(before + row.position, total)
                before += path.stat().st_size
            counts.append(writer.count - first)
    for name in FILES:
        sync(folder / name)
    index = {"made_of": made_of, "dtype": dtype, "counts": counts, "skipped": writer.skipped}
    index |= {"files": list(map(str, files)), "sizes": _sizes(folder)}
    write_json(folder / INDEX, {"index": index, "sha256": _digest(index)})


class _Writer:
    """Appends documents to the files of a folder, and counts them.

    Attributes:
        file: the number of the file that rows come from.
        count: documents so far.
        skipped: rows that could not be used.
    """

    def __init__(self, stack: contextlib.ExitStack, folder: Path, dtype: str):
        files: list[BinaryIO] = [stack.enter_context(open(folder / x, "wb")) for x in FILES]
        self._tokens, self._learned, self._records, self._rows, self._bad = files
        self._dtype = dtype
        self.file = self.count = self.skipped = 0

    def add(self, row: RawRow, reading: Reading) -> None:
        """Appends a row, or skips it if it cannot be used and that is wanted."""
        try:
            (prompt, learned), second = (
                reading.render_pair(row) if reading.pairs else (reading.render(row), 0)
            )
        except UserError as error:
            if not reading.skips:
                raise UserError(
                    f"{error} Correct or remove it, or set data.on_bad to skip."
                ) from None
            self.skipped += 1
            if self.skipped <= LISTED:
                self._bad.write(
                    json.dumps({"row": row.where, "error": str(error)}).encode() + b"\n"
                )
            return
        stored = row.content if prompt.pictures else b""
        tiles = sum(picture.num_tiles for picture in prompt.pictures)
        targets = np.count_nonzero(learned[1:])
        record = len(learned), targets, len(stored), tiles, self.file, row.number, second
        self._tokens.write(np.array(prompt.tokens, self._dtype).tobytes())
        self._learned.write(learned.tobytes())
        self._records.write(np.array(record, RECORD).tobytes())
        self._rows.write(stored)
        self.count += 1
