"""From the rows of a block to requests, and from their answers to lines of output."""

import itertools
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from jaxmoe.batch.folder import Ended
from jaxmoe.batch.formats import Asked, Envelope, error_line, is_failed, output_line, request_of
from jaxmoe.batch.work import JobRow, Work
from jaxmoe.files.rows import place_of_row
from jaxmoe.generation.jobs import Refusal, RequestReader
from jaxmoe.generation.request import Request

type Record = dict[str, Any]


class Answering:
    """Work whose rows are being answered.

    Attributes:
        work: what it is.
        requests: those of rows that have not ended.
        ended: the rows that have, by their numbers.
    """

    def __init__(
        self,
        work: Work,
        reader_of: Callable[[Path], RequestReader],
        noticed: Callable[[Envelope], None] = lambda envelope: None,
        running: Container[str] = (),
    ):
        """Reads the rows; one that cannot be read ends at once, with an error.

        Args:
            reader_of: makes the reader of rows whose files are in a folder.
            noticed: called with each row's envelope.
            running: ids of requests in work, which no other may have.
        """
        self.work, self._running = work, running
        self.ended = {row.number: row for row in work.ended}
        self.requests: list[Request] = []
        self._rows: dict[str, int] = {}  # the row of each request, by its id
        self._envelopes: dict[int, Envelope] = {}
        self._answers: dict[int, dict[str, Record | None]] = {}
        left = [row for row in work.rows if row.number not in self.ended]
        for folder, rows in itertools.groupby(left, lambda row: Path(row.file).parent):
            self._read(list(rows), reader_of(folder), noticed)

    def _read(
        self, rows: list[JobRow], reader: RequestReader, noticed: Callable[[Envelope], None]
    ) -> None:
        """Reads rows together, since their pictures are read in threads."""
        asked = [_asked(row) for row in rows]
        lines = [
            (_place(row), r) for row, one in zip(rows, asked, strict=True) for r in one.records
        ]
        found = iter(reader.read(lines))
        for row, one in zip(rows, asked, strict=True):
            noticed(one.envelope)
            each = list(itertools.chain(*itertools.islice(found, len(one.records))))
            self._begin(row.number, one, each)

    def _begin(self, number: int, asked: Asked, read: list[Request | Refusal]) -> None:
        refused = next((one.error for one in read if isinstance(one, Refusal)), asked.refusal)
        requests = [one for one in read if isinstance(one, Request)]
        taken = [
            str(one.id)
            for one in requests
            if str(one.id) in self._rows or str(one.id) in self._running
        ]
        if taken:
            said = f"row {number} of the job has the id {taken[0]!r:.80} of an earlier answer"
            refused = f"{said}; ids must differ."
        if refused is not None:
            self._end(number, error_line(asked.envelope, refused))
            return
        self._envelopes[number] = asked.envelope
        self._answers[number] = {str(one.id): None for one in requests}
        self._rows |= dict.fromkeys(self._answers[number], number)
        self.requests += requests

    def _end(self, number: int, line: Record) -> Ended:
        self.ended[number] = Ended(number, line, is_failed(line))
        return self.ended[number]

    @property
    def is_done(self) -> bool:
        """Whether all rows have ended."""
        return len(self.ended) == len(self.work.rows)

    @property
    def in_order(self) -> Iterator[Ended]:
        """The rows that have ended, in the order of the job."""
        return (self.ended[row.number] for row in self.work.rows if row.number in self.ended)

    def answered(self, record: Record) -> Ended | None:
        """Takes the record of an answer in; the row that ends with it, if one does.

        Args:
            record: as `jaxmoe.generation.jobs.finished` yields it.
        """
        number = self._rows[str(record["id"])]
        answers = self._answers[number]
        answers[str(record["id"])] = record
        records = [answer for answer in answers.values() if answer is not None]
        if len(records) < len(answers):
            return None
        del self._answers[number]
        return self._end(number, output_line(self._envelopes.pop(number), records))


def _place(row: JobRow) -> str:
    return place_of_row(row.file, row.line)


def _asked(row: JobRow) -> Asked:
    asked = request_of(row.content.encode("latin-1"), _place(row), row.number)
    if row.repeated and asked.refusal is None:
        said = f"{_place(row)} has the id {asked.envelope.id!r:.80} of an earlier row"
        return Asked(asked.envelope, refusal=f"{said}; ids must differ.")
    return asked
